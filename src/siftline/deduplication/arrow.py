"""Arrow's text columns as the kernels read them: bytes, offsets, and which rows hold nothing.

One schema over several tables: the type that holds the values of two, and arrays made of it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from siftline.kernels.text.texts import Texts

TextColumn: TypeAlias = pa.Array | pa.ChunkedArray


def pieces(column: TextColumn) -> Iterator[Texts]:
    """The chunks of a text column, without a copy of the text.

    Raises:
        ValueError: if the column does not hold text.
    """
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        if len(chunk):
            yield texts_of(chunk)


def texts_of(array: pa.Array) -> Texts:
    """One Arrow array of text.

    Raises:
        ValueError: if it holds something else.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    if pa.types.is_string_view(kind) or pa.types.is_null(kind):
        array = array.cast(pa.large_string())
        kind = array.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"a column of {kind} is not text: name one that is")
    _, offsets, data = array.buffers()
    width = np.int32 if pa.types.is_string(kind) else np.int64
    raw = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    raw.flags.writeable = False  # one compiled version, not two
    places = np.frombuffer(offsets, width)[array.offset : array.offset + len(array) + 1]
    if array.null_count:
        null = array.is_null().to_numpy(zero_copy_only=False).copy()
    else:
        null = np.zeros(len(array), np.bool_)
    return Texts(raw, places.astype(np.int64), null)


def arrow_of(values: np.ndarray | list[str]) -> pa.Array:
    """An Arrow array of numbers, truth values or strings, none missing.

    Written out because `pa.array` imports pandas, half a second, to see whether it got any of it.
    """
    if isinstance(values, list):
        raw = [value.encode() for value in values]
        offsets = np.cumsum([0, *map(len, raw)], dtype=np.int64)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(raw))]
        return pa.Array.from_buffers(pa.large_string(), len(raw), buffers).cast(pa.string())
    if values.dtype == np.bool_:
        bits = pa.py_buffer(np.packbits(values, bitorder="little"))
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, bits])
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, buffer])


def cuts(texts: Texts, size: int) -> list[tuple[int, int]]:
    """Ranges of rows of about `size` bytes each."""
    n = len(texts.null)
    first = texts.offsets[0]
    marks = np.arange(first + size, texts.offsets[n], size)
    ends = np.unique(np.append(np.searchsorted(texts.offsets[1:n], marks), n))
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    return [(int(a), int(b)) for a, b in zip(starts, ends, strict=True) if b > a]


def without_views(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with views as plain strings, which Arrow can filter."""
    plain = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    columns = [c.cast(plain[c.type]) if c.type in plain else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


_INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64())
_UNSIGNED = (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_UNITS = ("s", "ms", "us", "ns")
_DIGITS = 38
"""Most digits of a decimal that every reader takes."""


class Differ(Exception):
    """Two types have nothing in common; `path` says where in the column.

    Attributes:
        path: Keys below the column, each with its mark: `.key` or `[]`.
        left: Type on one side.
        right: Type on the other.
    """

    def __init__(self, path: str, left: pa.DataType, right: pa.DataType) -> None:
        super().__init__(path)
        self.path, self.left, self.right = path, left, right


class NoTableError(ValueError):
    """Values that no column of one type holds."""


def said(kind: pa.DataType) -> str:
    """What values of a type are called."""
    named: tuple[tuple[Callable[[pa.DataType], bool], str], ...] = (
        (pa.types.is_struct, "objects"),
        (is_listed, "lists"),
        (is_text, "text"),
        (pa.types.is_boolean, "true and false"),
        (_is_number, "numbers"),
    )
    return next((name for test, name in named if test(kind)), str(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is text, of whichever make."""
    return any(test(kind) for test in _TEXT)


def is_listed(kind: pa.DataType) -> bool:
    """Whether a type is a list, of whichever make."""
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )


def joined(left: pa.DataType, right: pa.DataType) -> pa.DataType:
    """The type that holds values of both; which comes first matters to the order of keys alone.

    Raises:
        Differ: if there is none.
    """
    if left.equals(right):
        return left
    if pa.types.is_null(left) or pa.types.is_null(right):
        return right if pa.types.is_null(left) else left
    if pa.types.is_dictionary(left) or pa.types.is_dictionary(right):
        plain = (k.value_type if pa.types.is_dictionary(k) else k for k in (left, right))
        return joined(*plain)
    if pa.types.is_struct(left) and pa.types.is_struct(right):
        return _joined_structs(left, right)
    if is_listed(left) and is_listed(right):
        inner = _below("[]", left.value_type, right.value_type)
        large = pa.types.is_large_list(left) or pa.types.is_large_list(right)
        return pa.large_list(inner) if large else pa.list_(inner)
    if _is_number(left) and _is_number(right):
        found = _joined_numbers(left, right)
    else:
        found = _joined_others(left, right)
    if found is None:
        raise Differ("", left, right)
    return found


def _below(mark: str, left: pa.DataType, right: pa.DataType) -> pa.DataType:
    try:
        return joined(left, right)
    except Differ as error:
        raise Differ(mark + error.path, error.left, error.right) from None


def _joined_structs(left: pa.StructType, right: pa.StructType) -> pa.DataType:
    parts = {part.name: part.type for part in left}
    for part in right:
        known = parts.get(part.name, pa.null())
        parts[part.name] = _below(f".{part.name}", known, part.type)
    return pa.struct(list(parts.items()))


def _joined_numbers(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    kinds = (left, right)
    if all(kind in _INTEGERS for kind in kinds) or all(kind in _UNSIGNED for kind in kinds):
        return max(kinds, key=lambda kind: kind.bit_width)
    if all(pa.types.is_integer(kind) for kind in kinds):
        unsigned = next(kind for kind in kinds if kind in _UNSIGNED)
        return pa.int64() if unsigned.bit_width < 64 else None
    if any(pa.types.is_decimal(kind) for kind in kinds):
        digits = [found for found in map(_digits, kinds) if found is not None]
        if len(digits) < 2:
            return None
        whole, scale = (max(part) for part in zip(*digits, strict=True))
        return pa.decimal128(whole + scale, scale) if whole + scale <= _DIGITS else None
    floats = [kind for kind in kinds if pa.types.is_floating(kind)]
    return floats[0] if len(floats) == 2 and floats[0] == floats[1] else pa.float64()


def _digits(kind: pa.DataType) -> tuple[int, int] | None:
    """Digits before and behind the point; None of floats."""
    if pa.types.is_decimal(kind):
        return kind.precision - kind.scale, kind.scale
    return (
        None if pa.types.is_floating(kind) else ({8: 3, 16: 5, 32: 10, 64: 20}[kind.bit_width], 0)
    )


def _joined_others(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    kinds = (left, right)
    if all(is_text(kind) for kind in kinds):
        return pa.large_string()
    if all(any(test(kind) for test in _BINARY) for kind in kinds):
        return pa.large_binary()
    if all(pa.types.is_timestamp(kind) for kind in kinds) and left.tz == right.tz:
        return pa.timestamp(max(left.unit, right.unit, key=_UNITS.index), left.tz)
    if all(pa.types.is_date(kind) for kind in kinds):
        return pa.date32()
    return None


def one_schema(tables: Iterable[tuple[str, pa.Schema]]) -> pa.Schema:
    """The schema that holds the rows of all tables; columns in the order they first occur.

    Args:
        tables: Name and schema of each.

    Raises:
        ValueError: naming two tables and the column they differ in.
    """
    columns: dict[str, tuple[pa.DataType, str]] = {}
    notes: list[Any] = []
    for name, schema in tables:
        notes.append(schema.metadata)
        for field in schema:
            known, first = columns.get(field.name, (pa.null(), name))
            try:
                both = joined(known, field.type)
            except Differ as error:
                raise NoTableError(
                    f"{first} and {name} differ in column {field.name + error.path!r}: "
                    f"{said(error.left)} ({error.left}) in one and {said(error.right)} "
                    f"({error.right}) in the other; write one kind"
                ) from None
            # Blame the table that gave the type what it is now.
            columns[field.name] = (both, name if not both.equals(known) else first)
    same = notes[0] if notes and all(note == notes[0] for note in notes) else None
    return pa.schema([(name, kind) for name, (kind, _) in columns.items()], same)


def check_storable(name: str, column: str, kind: pa.DataType) -> None:
    """Refuses what Parquet, or a reader of it, cannot hold.

    Raises:
        ValueError: naming the file and the column.
    """
    if pa.types.is_struct(kind):
        if not kind.num_fields:
            raise NoTableError(
                f"{name} has a column of empty objects alone ({column}), which no table can hold: "
                "drop it"
            )
        for part in kind:
            check_storable(name, f"{column}.{part.name}", part.type)
    elif is_listed(kind):
        check_storable(name, f"{column}[]", kind.value_type)


def conformed(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The same values as another type, one that `joined` gave.

    Raises:
        pa.ArrowInvalid: if a value is none of that type.
    """
    if array.type.equals(kind):
        return array
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), kind)
    if pa.types.is_dictionary(array.type):
        return conformed(array.dictionary_decode(), kind)
    if pa.types.is_struct(kind):
        parts = dict(zip((part.name for part in array.type), array.flatten(), strict=True))
        made = [
            conformed(parts[part.name], part.type)
            if part.name in parts
            else pa.nulls(len(array), part.type)
            for part in kind
        ]
        return pa.StructArray.from_arrays(made, fields=list(kind), mask=array.is_null())
    if is_listed(kind) and not pa.types.is_fixed_size_list(kind):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        large = pa.types.is_large_list(kind)
        ends = np.cumsum(np.concatenate([[0], lengths])).astype(np.int64 if large else np.int32)
        maker = pa.LargeListArray if large else pa.ListArray
        values = conformed(_values(array), kind.value_type)
        return maker.from_arrays(pa.array(ends), values, type=kind, mask=array.is_null())
    return array.cast(kind)


def _values(array: pa.Array) -> pa.Array:
    """The values of all lists that are not null, one behind the other."""
    found = array.flatten()
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def conformed_batch(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with the columns of a schema, those it lacks null."""
    if batch.schema.equals(schema):
        return batch
    arrays = [
        conformed(batch.column(field.name), field.type)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def narrowed(schema: pa.Schema, target: pa.Schema) -> Sequence[str]:
    """Columns whose whole numbers become floats on the way to a schema, at any depth."""
    return [f.name for f in schema if _becomes_float(f.type, target.field(f.name).type)]


def _becomes_float(kind: pa.DataType, target: pa.DataType) -> bool:
    if pa.types.is_integer(kind):
        return bool(pa.types.is_floating(target))
    if is_listed(kind) and is_listed(target):
        return _becomes_float(kind.value_type, target.value_type)
    if pa.types.is_struct(kind) and pa.types.is_struct(target):
        return any(_becomes_float(part.type, target.field(part.name).type) for part in kind)
    return False
