"""Files of each format into records, one at a time, with what can't be read told apart.

A record that can't be read is a `Fault` and reading goes on; a file that can't be read is a
ValueError that names it and the remedy. JSONL, CSV, Parquet and Arrow are streamed: one line or one
batch of rows is in memory. A plain JSON array is loaded whole; write large ones as JSONL.

Lines count from 1. JSONL counts lines of the file; the other formats count rows, since a CSV row
may span lines and the binary formats have none.
"""

import csv
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from siftline.ingest.files import InputFile, load_dataset
from siftline.ingest.limits import (
    FILE_BYTES,
    RECORD_BYTES,
    TOO_LONG,
    bounded_lines,
    record_fault,
)

EXCERPT = 200
"""Characters of a record that quarantine keeps."""
_ROWS = 256  # rows decoded at once; long conversations make more of them costly
_CSV_FIELD = RECORD_BYTES  # characters; an unclosed quote stops here instead of eating the file


@dataclass(frozen=True)
class Record:
    """One record: its line or row number from 1, and its columns."""

    line: int
    value: dict[str, Any]


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
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return Fault(line, "invalid_utf8", excerpt(raw))
    except (ValueError, RecursionError):
        return Fault(line, "invalid_json", excerpt(raw))
    return Record(line, value) if isinstance(value, dict) else _no_object(line, value)


def _no_object(line: int, value: object) -> Fault:
    return Fault(line, "not_an_object", excerpt(value))


def _read_json(file: InputFile) -> Iterator[Record | Fault]:
    if file.source.format == "auto" and _holds_lines(file):
        yield from _read_jsonl(file)
        return
    with _utf8_bytes(file) as stream:
        # Bytes that are no UTF-8 survive as surrogates, so they cost their record, not the file.
        raw = stream.read(FILE_BYTES + 1)
        if len(raw) > FILE_BYTES:
            raise ValueError(
                f"{file.path}: one JSON array of more than {FILE_BYTES:,} bytes, which has to be "
                "in memory whole: write one object a line (format jsonl)"
            )
        text = raw.decode("utf-8", "surrogateescape")
    if not text.strip():
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.path}: no valid JSON ({error}); correct or rewrite it") from error
    if not isinstance(values, list):
        raise ValueError(
            f"{file.path}: a JSON file must hold one array of objects, or one object a line "
            f"(format jsonl); it holds {type(values).__name__}"
        )
    for line, value in enumerate(values, start=1):
        yield Record(line, value) if isinstance(value, dict) else _no_object(line, value)


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
        last = [""]
        # Strict: a broken quote is an error, not a guess.
        rows = csv.reader(_Lines(text, last), strict=True)
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

    def __init__(self, text: io.TextIOWrapper, last: list[str]) -> None:
        self._text, self._last = text, last

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(RECORD_BYTES + 1)
        if not line:
            raise StopIteration
        self._last[0] = line
        if len(line) > RECORD_BYTES:
            self._last[0] = line[:EXCERPT]
            while line and not line.endswith(("\n", "\r")):
                line = self._text.readline(1 << 20)
            raise LongLine(f"a line of more than {RECORD_BYTES:,} characters")
        return line


def _csv_record(line: int, header: list[str], fields: list[str]) -> Record | Fault:
    if len(fields) != len(header):
        reason = "too_many_fields" if len(fields) > len(header) else "too_few_fields"
        return Fault(line, reason, excerpt(",".join(fields)))
    return Record(line, dict(zip(header, fields, strict=True)))


def _read_parquet(file: InputFile) -> Iterator[Record | Fault]:
    with file.open() as stream, pq.ParquetFile(stream) as parquet:
        _check_names(file, parquet.schema_arrow.names)
        yield from _records_of(parquet.iter_batches(batch_size=_ROWS))


def _read_arrow(file: InputFile) -> Iterator[Record | Fault]:
    with file.open() as stream:
        # The IPC file format starts with this; what lacks it is the stream format.
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            reader = pa.ipc.open_file(stream)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(stream)
            batches = iter(reader)
        _check_names(file, reader.schema.names)
        yield from _records_of(batches)


def _read_dataset(file: InputFile) -> Iterator[Record | Fault]:
    tables = load_dataset(file.source).iter(batch_size=_ROWS)
    yield from _records_of(batch for table in tables for batch in table.to_batches())


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
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "datasets": _read_dataset,
}
