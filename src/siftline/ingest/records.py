"""The one reader: files of each format into records, with what can't be read told apart.

A record that can't be read is a `Fault` and reading goes on; a file that can't be read is a
ValueError that names it and the remedy. JSONL, CSV, Parquet and Arrow are streamed: one line or one
batch of rows is in memory. A plain JSON array is loaded whole; write large ones as JSONL.

Lines count from 1. JSONL counts lines of the file; the other formats count rows, since a CSV row
may span lines and the binary formats have none.
"""

import csv
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from siftline.ingest.files import InputFile, load_dataset
from siftline.ingest.parse import (
    FILE_BYTES,
    RECORD_BYTES,
    TOO_LONG,
    Unparsable,
    bounded_lines,
    parse_record,
    parse_text,
    record_fault,
    whole_text,
)

logger = logging.getLogger(__name__)

EXCERPT = 200
"""Characters of a record that quarantine keeps."""
_ROWS = 256  # rows decoded at once; long conversations make more of them costly
_CSV_FIELD = RECORD_BYTES  # characters; an unclosed quote stops here instead of eating the file
_SEPARATORS = (",", ";", "\t", "|")


@dataclass(frozen=True)
class Record:
    """One record: its line or row number from 1, its columns, and how many keys were repeated."""

    line: int
    value: dict[str, Any]
    repeated: int = 0


@dataclass(frozen=True)
class Fault:
    """One record that becomes no row, and why."""

    line: int
    reason: str
    excerpt: str


class EmptyFile(ValueError):
    """A file without a record, by its path."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path}: empty, it has no rows; remove it from the source")
        self.path = path


def read_records(file: InputFile) -> Iterator[Record | Fault]:
    """Reads a file's records in order.

    Raises:
        EmptyFile: if it has no record.
        ValueError: if it is damaged, half-written or in another format than it says.
    """
    count = 0
    with _whole_file_faults(file):
        for item in _READERS[file.format](file):
            count += 1
            yield _within_limits(item)
    if not count:
        raise EmptyFile(file.path)


def columns_of(file: InputFile, most: int = 200) -> list[str]:
    """Columns of a file's first records, in the order they occur.

    Raises:
        ValueError: as `read_records`.
    """
    if file.format == "parquet":
        with _whole_file_faults(file), file.open() as stream:
            return list(pq.read_schema(stream).names)
    items = islice(read_records(file), most)
    return list(dict.fromkeys(k for i in items if isinstance(i, Record) for k in i.value))


def _within_limits(item: Record | Fault) -> Record | Fault:
    reason = record_fault(item.value) if isinstance(item, Record) else None
    if reason is None:
        return item
    assert isinstance(item, Record)
    return Fault(item.line, reason, excerpt(", ".join(item.value)))


def excerpt(value: object) -> str:
    """The first characters of a faulty record, as text any file can hold."""
    if isinstance(value, bytes):
        text = value[: 4 * EXCERPT].decode("utf-8", "replace")
    elif isinstance(value, str):
        text = value
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text.strip()[:EXCERPT].encode("utf-8", "replace").decode()


@contextmanager
def _whole_file_faults(file: InputFile) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{file.path}: no such file") from error
    except PermissionError as error:
        raise ValueError(f"{file.path}: no permission to read it") from error
    except MemoryError:
        raise  # also an ArrowException, but says nothing about the file
    # Arrow reports damage as ArrowException or OSError, a truncated gzip is an EOFError.
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise ValueError(
            f"{file.path}: damaged, half-written or no {file.format} file; "
            f"write or fetch it again ({error})"
        ) from error


def _read_jsonl(file: InputFile) -> Iterator[Record | Fault]:
    with _utf8_bytes(file) as stream:
        for line, raw, reason in bounded_lines(stream):
            if reason is not None:
                yield Fault(line, reason, excerpt(raw))
            elif raw.strip():
                yield _parse_line(line, raw)


def _parse_line(line: int, raw: bytes) -> Record | Fault:
    try:
        value, repeated = parse_record(raw)
    except Unparsable as error:
        return Fault(line, error.reason, excerpt(raw))
    return Record(line, value, repeated) if isinstance(value, dict) else _no_object(line, value)


def _no_object(line: int, value: object) -> Fault:
    return Fault(line, "not_an_object", excerpt(value))


def _read_json(file: InputFile) -> Iterator[Record | Fault]:
    if file.source.format == "auto" and _holds_lines(file):
        yield from _read_jsonl(file)
        return
    with _utf8_bytes(file) as stream:
        raw = stream.read(FILE_BYTES + 1)
        if len(raw) > FILE_BYTES:
            raise ValueError(
                f"{file.path}: one JSON array of more than {FILE_BYTES:,} bytes, which has to be "
                "in memory whole: write one object a line (format jsonl)"
            )
    if not raw.strip():
        return
    values, repeated, whole = _parse_array(file, raw)
    for line, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            yield _no_object(line, value)
        elif not whole and not whole_text(value):
            yield Fault(line, "invalid_utf8", excerpt(value))
        else:
            yield Record(line, value, repeated if line == 1 else 0)


def _parse_array(file: InputFile, raw: bytes) -> tuple[list[Any], int, bool]:
    """A whole file's array, its repeated keys, and whether all of its text is known to be whole."""
    try:
        values, repeated = parse_record(raw)
        whole = True
    except Unparsable:
        # Bytes that are no UTF-8 survive as surrogates, so they cost their record, not the file.
        try:
            values, repeated = parse_text(raw.decode("utf-8", "surrogateescape"))
        except Unparsable as error:
            raise ValueError(
                f"{file.path}: no valid JSON ({error.__cause__}); correct or rewrite it"
            ) from error
        whole = False
    if not isinstance(values, list):
        raise ValueError(
            f"{file.path}: a JSON file must hold one array of objects, or one object a line "
            f"(format jsonl); it holds {type(values).__name__}"
        )
    return values, repeated, whole


def _holds_lines(file: InputFile) -> bool:
    """Whether a `.json` file is in truth JSONL, as many published ones are."""
    with _utf8_bytes(file) as stream:
        found = ((raw, reason) for _, raw, reason in bounded_lines(stream) if raw.strip())
        first, reason = next(found, (b"", None))
    if reason is not None:  # an object all the same, if one that can't be read
        return first.lstrip().startswith(b"{")
    return first.lstrip().startswith(b"{") and isinstance(_parse_line(1, first), Record)


def _read_csv(file: InputFile) -> Iterator[Record | Fault]:
    # A setting of the whole process; its default of 128 KiB is shorter than real conversations.
    csv.field_size_limit(max(_CSV_FIELD, csv.field_size_limit()))
    with _utf8_bytes(file) as stream:
        text = io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="")
        first = text.readline(RECORD_BYTES + 1)
        last = [""]
        separator = _separator(file, first)
        # Strict: a broken quote is an error, not a guess.
        lines = _Lines(text, last, first)
        rows = csv.reader(lines, strict=True, delimiter=separator)
        try:
            header = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{file.path}: no valid CSV header ({error})") from error
        if header is None:
            return
        _check_names(file, header)
        line = 0
        while True:
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                line += 1
                reason = TOO_LONG if isinstance(error, LongLine) else "invalid_csv"
                yield Fault(line, reason, excerpt(f"{error}: {last[0]}"))
                continue
            if fields:
                line += 1
                yield _csv_record(line, header, fields)


class LongLine(csv.Error):
    """A line of a CSV file that is not read to its end."""


class _Lines:
    """Passes lines on and keeps the newest in `last`, for the excerpt of a broken row.

    No generator: it goes on behind a line that it refuses.
    """

    def __init__(self, text: io.TextIOWrapper, last: list[str], first: str) -> None:
        self._text, self._last, self._first = text, last, first

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._first or self._text.readline(RECORD_BYTES + 1)
        self._first = ""
        if not line:
            raise StopIteration
        self._last[0] = line
        if len(line) > RECORD_BYTES:
            self._last[0] = line[:EXCERPT]
            while line and not line.endswith(("\n", "\r")):
                line = self._text.readline(1 << 20)
            raise LongLine(f"a line of more than {RECORD_BYTES:,} characters")
        return line


def _separator(file: InputFile, header: str) -> str:
    """What parts the fields: the comma, unless the header has none and another mark parts it."""
    cut = {mark: len(next(csv.reader([header], delimiter=mark), [])) for mark in _SEPARATORS}
    if cut[","] > 1:
        return ","
    found = max(_SEPARATORS, key=lambda mark: cut[mark])
    if cut[found] < 2:
        return ","
    logger.info("%s: its fields are parted by %r", file.path, found)
    return found


def _csv_record(line: int, header: list[str], fields: list[str]) -> Record | Fault:
    if len(fields) == len(header) + 1 and not fields[-1]:  # a mark behind the last field, too
        fields = fields[:-1]
    if len(fields) != len(header):
        reason = "too_many_fields" if len(fields) > len(header) else "too_few_fields"
        return Fault(line, reason, excerpt(",".join(fields)))
    value = dict(zip(header, fields, strict=True))
    return (
        Record(line, value) if whole_text(fields) else Fault(line, "invalid_utf8", excerpt(value))
    )


def _read_binary(file: InputFile) -> Iterator[Record | Fault]:
    yield from _records_of(batches_of(file, _ROWS))


BINARY = ("parquet", "arrow", "datasets")
"""Formats that `batches_of` reads."""


def batches_of(file: InputFile, rows: int = 1 << 16) -> Iterator[pa.RecordBatch]:
    """Record batches of a file in a binary format, in the order rows are counted.

    Args:
        file: The file.
        rows: Most rows of a batch, where the format is not cut into batches itself.

    Raises:
        ValueError: if two columns have one name, or one is no UTF-8.
    """
    if file.format == "datasets":
        for table in load_dataset(file.source).iter(batch_size=min(rows, 1000)):
            yield from table.to_batches()
        return
    with file.open() as stream:
        if file.format == "parquet":
            with pq.ParquetFile(stream) as parquet:
                _check_names(file, parquet.schema_arrow.names)
                yield from parquet.iter_batches(batch_size=rows)
            return
        # The IPC file format starts with this; what lacks it is the stream format.
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
        _check_names(file, reader.schema.names)
        if is_file:
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from reader


def _records_of(batches: Iterator[pa.RecordBatch]) -> Iterator[Record | Fault]:
    line = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            part = batch.slice(start, _ROWS)
            try:
                rows = part.to_pylist()
            except UnicodeDecodeError:  # writers don't check that strings are UTF-8
                rows = [_decoded(part.slice(i, 1)) for i in range(part.num_rows)]
            for value in rows:
                line += 1
                is_fault = isinstance(value, str)
                yield Fault(line, "invalid_utf8", value) if is_fault else Record(line, value)


def _decoded(row: pa.RecordBatch) -> dict[str, Any] | str:
    """One row as a dict, or an excerpt of its readable columns."""
    readable, broken = {}, False
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            readable[name] = column[0].as_py()
        except UnicodeDecodeError:
            broken = True
    return excerpt(readable) if broken else readable


@contextmanager
def _utf8_bytes(file: InputFile) -> Iterator[IO[bytes]]:
    """Opens a text file after its byte order mark.

    Raises:
        ValueError: if the mark says UTF-16 or UTF-32.
    """
    with file.open_text() as stream:
        assert isinstance(stream, io.BufferedReader)
        head = stream.peek(4)[:4]
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(f"{file.path}: UTF-16, not UTF-8; save it as UTF-8")
        if head.startswith(b"\xef\xbb\xbf"):
            stream.read(3)
        yield stream


def _check_names(file: InputFile, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{file.path}: two columns are called {twice[0]!r}; rename one")
    broken = [name for name in names if excerpt(name) != name.strip()[:EXCERPT]]
    if broken:
        raise ValueError(f"{file.path}: the header is no UTF-8: {excerpt(broken[0])!r}")


_READERS: dict[str, Callable[[InputFile], Iterator[Record | Fault]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    **dict.fromkeys(BINARY, _read_binary),
}
