"""Arrow's text columns as the kernels read them: bytes, offsets, and which rows hold nothing."""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import pyarrow as pa

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
