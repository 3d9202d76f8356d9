"""Files of any format but local Parquet, as Arrow files that are read piece by piece.

Records come from the one reader (`ingest.records`), so that a line means here what it means to a
recipe. The first line that can't be read, or that holds another kind of value than the lines before
it, is an error that names it: rows leave as they came in.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from siftline.deduplication.arrow import (
    Differ,
    NoTableError,
    conformed_batch,
    joined,
    narrowed,
    one_schema,
    said,
)
from siftline.ingest.files import InputFile
from siftline.ingest.records import BINARY, Fault, Record, batches_of, read_records

_ROWS = 8192
_EXACT = 2**53
"""Whole numbers up to here are floats, too."""


@dataclass(frozen=True)
class Chunks:
    """A converted file.

    Attributes:
        paths: Arrow files, one behind the other; their schemas may differ.
        rows: Number of rows.
        schema: What holds them all.
        repeated: Keys that stood in an object twice; the last counts.
    """

    paths: tuple[Path, ...]
    rows: int
    schema: pa.Schema
    repeated: int


class _Exact(Exception):
    """A column of whole numbers beyond a float's, and of fractions."""

    def __init__(self, column: str) -> None:
        super().__init__(column)
        self.column = column


def to_chunks(file: InputFile, folder: Path, skip: Collection[int] = ()) -> Chunks:
    """Converts a file.

    Args:
        file: Where it is and how it is written.
        folder: Where the chunks go; made here.
        skip: Lines that are left out, of a text format.

    Raises:
        ValueError: naming the line that can't be read, or two that differ in kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if file.format in BINARY:
        return _copied(file, folder)
    decimals: frozenset[str] = frozenset()
    while True:
        try:
            return _converted(file, folder, decimals, skip)
        except _Exact as found:
            decimals |= {found.column}


def read_chunks(paths: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    """The batches of Arrow files."""
    for path in paths:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            for k in range(reader.num_record_batches):
                yield reader.get_batch(k)


def check_whole_numbers(
    name: str, batches: Iterator[pa.RecordBatch], schema: pa.Schema, target: pa.Schema
) -> None:
    """Holds to it that no whole number changes where a column of floats takes it in.

    Raises:
        ValueError: naming the column.
    """
    columns = narrowed(schema, target)
    if not columns:
        return
    for batch in batches:
        for column in columns:
            part = pa.schema([target.field(column)])
            try:
                conformed_batch(batch.select([column]), part)
            except pa.ArrowInvalid as error:
                raise NoTableError(
                    f"{name} has whole numbers above 2^53 in column {column!r}, which holds "
                    "fractions in another file: write them as text"
                ) from error


def _copied(file: InputFile, folder: Path) -> Chunks:
    rows, schema, path = 0, None, folder / "0.arrow"
    writer = None
    try:
        for batch in batches_of(file):
            if writer is None:
                schema = batch.schema
                writer = _writer(path, schema)
            writer.write_batch(batch)
            rows += batch.num_rows
    finally:
        if writer is not None:
            writer.close()
    if schema is None:
        raise ValueError(f"{file.path} is empty: leave it out")
    return Chunks((path,), rows, schema, 0)


def _writer(path: Path, schema: pa.Schema) -> pa.RecordBatchFileWriter:
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    return pa.ipc.new_file(str(path), schema, options=options)


def _converted(
    file: InputFile, folder: Path, decimals: frozenset[str], skip: Collection[int]
) -> Chunks:
    paths: list[Path] = []
    schemas: list[tuple[str, pa.Schema]] = []
    rows = repeated = 0
    items = (item for item in read_records(file) if item.line not in skip)
    while records := [_sound(file, item) for item in islice(items, _ROWS)]:
        batch = _batch(file, records, decimals)
        path = folder / f"{len(paths)}.arrow"
        with _writer(path, batch.schema) as writer:
            writer.write_batch(batch)
        paths.append(path)
        schemas.append((f"{file.path} from line {records[0].line}", batch.schema))
        rows += len(records)
        repeated += sum(record.repeated for record in records)
    schema = one_schema(schemas)  # of no columns where every line is skipped
    for path, (_, found) in zip(paths, schemas, strict=True):
        try:
            check_whole_numbers(file.path, read_chunks([path]), found, schema)
        except ValueError:
            column = narrowed(found, schema)[0]
            if pa.types.is_integer(found.field(column).type):
                raise _Exact(column) from None
            raise
    return Chunks(tuple(paths), rows, schema, repeated)


def _sound(file: InputFile, item: Record | Fault) -> Record:
    if isinstance(item, Fault):
        raise ValueError(
            f"{file.path} line {item.line} can't be read ({item.reason}: {item.excerpt[:80]!r}): "
            "correct the line or take it out"
        )
    return item


def _batch(file: InputFile, records: Sequence[Record], decimals: frozenset[str]) -> pa.RecordBatch:
    names = dict.fromkeys(name for record in records for name in record.value)
    arrays = []
    for name in names:
        values = [record.value.get(name) for record in records]
        if name in decimals:
            values = [None if v is None else Decimal(repr(v)) for v in values]
        try:
            arrays.append(_array(values))
        except (pa.ArrowException, OverflowError) as error:
            _explain(file, name, values, records)
            raise NoTableError(
                f"{file.path} column {name!r} fits no table ({error}): write one kind of value"
            ) from error
    if not names:
        raise ValueError(f"{file.path} has records without any column: take them out")
    return pa.RecordBatch.from_arrays(arrays, names=list(names))


def _array(values: list[Any]) -> pa.Array:
    """An Arrow array of JSON values, as `pa.array` makes it.

    Plain columns are made here: `pa.array` imports pandas, a third of a second, to see whether it
    got any of it.
    """
    kinds = set(map(type, values)) - {type(None)}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind not in (str, int, float, bool):
        return pa.array(values)
    there = np.array([value is not None for value in values], np.bool_)
    bits = None if there.all() else pa.py_buffer(np.packbits(there, bitorder="little"))
    if kind is str:
        raw = [b"" if value is None else value.encode() for value in values]
        ends = np.cumsum([0, *map(len, raw)], dtype=np.int64)
        buffers = [bits, pa.py_buffer(ends), pa.py_buffer(b"".join(raw))]
        return pa.Array.from_buffers(pa.large_string(), len(raw), buffers).cast(pa.string())
    plain = [0 if value is None else value for value in values]
    if kind is bool:
        buffer = pa.py_buffer(np.packbits(np.array(plain, np.bool_), bitorder="little"))
        return pa.Array.from_buffers(pa.bool_(), len(plain), [bits, buffer])
    numbers = np.array(plain, np.float64 if kind is float else np.int64)
    buffers = [bits, pa.py_buffer(numbers)]
    return pa.Array.from_buffers(pa.from_numpy_dtype(numbers.dtype), len(plain), buffers)


def _explain(file: InputFile, name: str, values: Sequence[Any], records: Sequence[Record]) -> None:
    """Says what is wrong with a column.

    Raises:
        ValueError: naming the lines.
        _Exact: where decimals hold its numbers.
    """
    kind, first = pa.null(), records[0].line
    for value, record in zip(values, records, strict=True):
        try:
            both = joined(kind, _kind_of(value))
        except OverflowError:
            raise NoTableError(
                f"{file.path} line {record.line} has a whole number of more than 64 bits in column "
                f"{name!r}: write such numbers as text"
            ) from None
        except Differ as error:
            lines = "" if first == record.line else f"line {first} and "
            raise NoTableError(
                f"{file.path} {lines}line {record.line}: {said(error.left)} and "
                f"{said(error.right)} in column {name + error.path!r}, and values there differ in "
                "kind; correct the line, or write one kind"
            ) from None
        first = record.line if not both.equals(kind) else first
        kind = both
    if pa.types.is_floating(kind):
        raise _Exact(name)
    wide = next((r.line for v, r in zip(values, records, strict=True) if _is_wide(v)), None)
    if wide is not None:
        raise NoTableError(
            f"{file.path} line {wide} has a whole number above 2^53 in column {name!r}, beside "
            "fractions: write them as text"
        )


def _kind_of(value: Any) -> pa.DataType:
    """The type of a JSON value.

    Raises:
        OverflowError: for a whole number of more than 64 bits.
    """
    if value is None:
        return pa.null()
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise OverflowError
        return pa.int64()
    if isinstance(value, float):
        return pa.float64()
    if isinstance(value, str):
        return pa.string()
    if isinstance(value, dict):
        return pa.struct([(key, _kind_below(f".{key}", inner)) for key, inner in value.items()])
    assert isinstance(value, list), f"{type(value).__name__} in JSON"
    kind = pa.null()
    for inner in value:
        kind = _kind_below("[]", inner, kind)
    return pa.list_(kind)


def _kind_below(mark: str, value: Any, kind: pa.DataType | None = None) -> pa.DataType:
    try:
        return joined(kind or pa.null(), _kind_of(value))
    except Differ as error:
        raise Differ(mark + error.path, error.left, error.right) from None


def _is_wide(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_is_wide, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT
