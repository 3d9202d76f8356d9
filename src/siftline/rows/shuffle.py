"""Puts a stream of rows into the order of hash(seed, id) and cuts it into shards, on little memory.

Rows are written to disk by range of their draw and read back range by range, so the order is global
while memory holds one range. Cuts are made by the bytes of values: the buffers of an Arrow table
depend on how it was put together, and a shard must not.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from siftline.kernels.draws import uniforms
from siftline.rows.native import used_fields
from siftline.rows.schema import ROW

STAGE = "curated"
SPOOLED = pa.schema([ROW.field("id"), ROW.field("messages"), ROW.field("tools")])
BATCH = 1 << 16  # rows looked at once
RANGE_LIMIT = 2**31 - 1  # bytes that 32-bit string offsets can address


@dataclass(frozen=True)
class Shuffled:
    """Rows on disk, by range of their draw.

    Attributes:
        folder: Holds `<range>.arrow`.
        seed: Seed of the draws.
        ranges: Into how many equal ranges (0, 1) is cut.
        rows: Rows shuffled.
        used: Which optional fields some row fills; see `native.used_fields`, and `tools`.
    """

    folder: Path
    seed: int
    ranges: int
    rows: int
    used: frozenset[str]


def shuffle(tables: Iterable[pa.Table], folder: Path, seed: int, ranges: int) -> Shuffled:
    """Writes id, messages and tools of all rows into a new folder.

    Args:
        tables: Tables of `schema.ROW`.
        folder: Does not exist yet.
        seed: Seed of the order.
        ranges: Number of files at most.

    Raises:
        ValueError: for a row without messages.
    """
    folder.mkdir()
    rows, used = 0, set()
    with ExitStack() as stack:
        writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        for table in tables:
            for batch in table.select(SPOOLED.names).cast(SPOOLED).to_batches(BATCH):
                rows += batch.num_rows
                used |= _used_fields(batch)
                draws = uniforms(seed, STAGE, batch["id"].to_pylist())
                numbers = (draws * ranges).astype(np.int64)
                for number in np.unique(numbers).tolist():
                    if number not in writers:
                        path = folder / f"{number}.arrow"
                        writers[number] = stack.enter_context(pa.ipc.new_stream(path, SPOOLED))
                    writers[number].write_batch(batch.take(np.flatnonzero(numbers == number)))
    return Shuffled(folder, seed, ranges, rows, frozenset(used))


def _used_fields(batch: pa.RecordBatch) -> set[str]:
    import pyarrow.compute as pc

    lengths = pc.list_value_length(batch["messages"])
    if pc.min(lengths).as_py() == 0:
        identity = batch["id"][pc.index(lengths, 0).as_py()]
        raise ValueError(f"row {identity} has no messages, which trainers can't read: remove it")
    offered = {"tools"} if batch["tools"].null_count < batch.num_rows else set()
    return used_fields(batch["messages"]) | offered


def read_ordered(shuffled: Shuffled) -> Iterator[pa.Table]:
    """Yields the ranges in order, each sorted by (draw, id), as one-chunk tables of `SPOOLED`.

    A range's file is deleted once the next is asked for.

    Raises:
        ValueError: if an id comes twice or a range is over 2 GiB.
    """
    for number in range(shuffled.ranges):
        path = shuffled.folder / f"{number}.arrow"
        if not path.exists():
            continue
        if path.stat().st_size > RANGE_LIMIT:
            raise ValueError(
                f"a range of the shuffle is over 2 GiB: raise ranges={shuffled.ranges}"
            )
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all().combine_chunks()
        ids = table["id"].to_pylist()
        # Equal ids have equal draws, so a repeated id ends up beside itself.
        order = np.lexsort((np.array(ids), uniforms(shuffled.seed, STAGE, ids)))
        _refuse_repeats([ids[i] for i in order])
        yield table.take(order)
        path.unlink()


def _refuse_repeats(ids: Sequence[str]) -> None:
    twice = next((a for a, b in pairwise(ids) if a == b), None)
    if twice is not None:
        raise ValueError(f"row {twice} comes more than once: a selection is a set of ids")


def value_bytes(array: pa.Array) -> np.ndarray:
    """Bytes of each value: lengths of strings plus 4, 8 for anything of fixed size.

    Returns:
        int64 array, shape (len(array),).
    """
    import pyarrow.compute as pc

    if pa.types.is_list(array.type):
        inner = np.concatenate([[0], np.cumsum(value_bytes(array.flatten()))])
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        return np.diff(inner[np.concatenate([[0], np.cumsum(lengths)])]) + 4
    if pa.types.is_struct(array.type):
        return np.sum([value_bytes(child) for child in array.flatten()], axis=0)
    if pa.types.is_string(array.type):
        lengths = pc.fill_null(pc.binary_length(array), 0)
        return lengths.to_numpy(zero_copy_only=False).astype(np.int64) + 4
    return np.full(len(array), 8, dtype=np.int64)


def cut(tables: Iterable[pa.Table], limit: int) -> Iterator[pa.Table]:
    """Cuts a stream of tables into pieces under `limit` bytes, greedily and row by row.

    The cuts depend on the rows alone, not on how the stream was cut before. A row larger than
    `limit` is a piece of its own; no piece is empty.

    Args:
        tables: Tables of one schema.
        limit: Bytes of the values (`value_bytes`) in one piece.
    """
    pending: list[pa.Table] = []
    size = 0
    for table in tables:
        ends = np.cumsum(_row_bytes(table))
        start = 0
        while start < table.num_rows:
            done = int(ends[start - 1]) if start else 0
            stop = max(start, int(np.searchsorted(ends, done + limit - size, side="right")))
            if stop == start and not pending:
                stop = start + 1
            if stop > start:
                pending.append(table.slice(start, stop - start))
                size += int(ends[stop - 1]) - done
            if stop < table.num_rows:
                yield pa.concat_tables(pending)
                pending, size = [], 0
            start = stop
    if pending:
        yield pa.concat_tables(pending)


def _row_bytes(table: pa.Table) -> np.ndarray:
    columns = [[value_bytes(chunk) for chunk in column.chunks] for column in table.columns]
    return np.sum([np.concatenate([*chunks, []]) for chunks in columns], axis=0).astype(np.int64)
