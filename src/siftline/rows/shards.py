"""Parquet in and out: bytes that never depend on the clock, files that appear whole or not at all.

Three habits hold everywhere:

* A file is written under a dot-name in its final folder, flushed to disk, and renamed once. Readers
  (globs, `datasets`, Spark) skip dot-names, so nobody sees half a file.
* A folder with many files is built under a dot-name and renamed once (`building`).
* A bucketed dataset is a manifest that names immutable parts, and the manifest is written last.
  Part names carry their content's hash, so a part is never overwritten and a manifest that was read
  once stays readable. It holds its own hash, and those of its parts are compared at every reading
  (`verified`).

Buckets are id ranges (leading bits), so buckets in order, each sorted by id, are the whole pool
sorted by id: content hashes taken in that order do not depend on how many buckets there are.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from siftline.disk import Sink, unfinished, writing
from siftline.kernels.draws import uniforms
from siftline.rows.native import used_fields
from siftline.rows.schema import ROW
from siftline.rows.verified import (
    RERUN,
    AlteredError,
    UnhashedError,
    canonical_json,
    file_hash,
    named_hash,
    read_hashed,
    read_parquet,
    with_hash,
)

ROW_GROUP_BYTES = 64 << 20
"""In-memory bytes of one row group: the Hub's viewer wants them under 100 MB."""


def sync(path: Path) -> None:
    """Has the disk hold a file or a folder's entries before anything that relies on them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a dot-named path beside `path`: renamed into place on success, else removed."""
    temporary = path.with_name(unfinished(path.name))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


@contextmanager
def building(final: Path) -> Iterator[Path]:
    """Builds a folder under a dot-name and renames it to `final` once it is complete.

    Yields:
        An empty folder beside `final`. On an exception it is removed and `final` never appears.

    Raises:
        FileExistsError: if `final` exists; published folders are immutable.
    """
    if final.exists():
        raise FileExistsError(f"{final} exists and is immutable: publish under another name")
    temporary = final.with_name(unfinished(final.name))
    with writing(final), _built(final, temporary):
        yield temporary


@contextmanager
def _built(final: Path, temporary: Path) -> Iterator[None]:
    final.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run with the same process id
    temporary.mkdir()
    try:
        yield
        for folder, _, files in os.walk(temporary):
            for name in files:
                sync(Path(folder) / name)
            sync(Path(folder))
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(final.parent)


def point_latest(folder: Path, target: str, name: str = "latest") -> None:
    """Points the relative symlink `folder/name` at `target` by one rename; a no-op if it does."""
    link = folder / name
    if link.is_symlink() and os.readlink(link) == target:
        return
    temporary = folder / unfinished(name)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
    sync(folder)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically; leaves an equal file untouched."""
    if path.exists() and path.read_bytes() == text.encode():
        return
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON with sorted keys, atomically; leaves an equal file untouched."""
    write_text(path, json.dumps(value, ensure_ascii=False, sort_keys=True, indent=1) + "\n")


def _slices(table: pa.Table, limit: int) -> Iterator[pa.Table]:
    """Halves a table until each piece is under `limit` bytes: rows vary a hundredfold in size."""
    if table.num_rows > 1 and table.nbytes > limit:
        middle = table.num_rows // 2
        yield from _slices(table.slice(0, middle), limit)
        yield from _slices(table.slice(middle), limit)
    else:
        yield table


def write_parquet(table: pa.Table, path: Path, *, row_group_bytes: int = ROW_GROUP_BYTES) -> None:
    """Writes one Parquet file atomically, with bytes that depend on the table alone.

    zstd, statistics, page index, page checksums, and content-defined chunking, so that a store that
    deduplicates chunks keeps the unchanged part of the next version.

    Args:
        table: What to write; its schema is written as it is, so pass an explicit one.
        path: Final path.
        row_group_bytes: Upper bound of one row group in memory.
    """
    with (
        _replacing(path) as temporary,
        Sink(temporary) as sink,
        pq.ParquetWriter(
            sink,
            table.schema,
            compression="zstd",
            write_page_index=True,
            write_page_checksum=True,
            use_content_defined_chunking=True,
        ) as writer,
    ):
        for piece in _slices(table.combine_chunks(), row_group_bytes):
            writer.write_table(piece, row_group_size=max(1, piece.num_rows))
            sink.check()


@dataclass(frozen=True)
class Part:
    """One immutable Parquet file of a bucketed dataset."""

    table: str
    bucket: int
    file: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a dataset consists of.

    Attributes:
        version: Hash of the content, independent of buckets and parts.
        buckets: Number of id ranges, a power of two.
        parts: The files; a bucket's parts are read in this order, base first, then deltas.
        info: Counts, facts and the identity of what made it. JSON.
    """

    version: str
    buckets: int
    parts: tuple[Part, ...]
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Reads a manifest.

        Raises:
            ValueError: if the file is not a manifest, or not as it was written.
        """
        raw = read_hashed(path, "a manifest")
        try:
            return cls(
                version=raw["version"],
                buckets=raw["buckets"],
                parts=tuple(Part(**part) for part in raw["parts"]),
                info=raw["info"],
            )
        except (KeyError, TypeError) as error:
            raise AlteredError(f"{path} is not a manifest ({error}): {RERUN}") from error

    @classmethod
    def found(cls, path: Path) -> "Manifest | None":
        """The manifest at `path` for who makes it: None where there is none, or one without a hash.

        Raises:
            ValueError: if the file is there and damaged.
        """
        try:
            return cls.load(path) if path.exists() else None
        except UnhashedError:  # of an earlier version of Siftline
            return None

    def save(self, path: Path) -> None:
        """Writes the manifest; call it after every part is in place."""
        write_json(path, with_hash(asdict(self)))

    def missing(self, folder: Path) -> list[str]:
        """Files of the manifest that are not in `folder`."""
        return [part.file for part in self.parts if not (folder / part.file).exists()]

    def rows(self, table: str) -> int:
        """Number of rows of one table over all its parts."""
        return sum(part.rows for part in self.parts if part.table == table)


class PartWriter:
    """Writes the parts of one dataset into a folder, named by content.

    Args:
        folder: Where the parts go.
        stem: First part of every file name; by default the table and the bucket.
    """

    def __init__(self, folder: Path, stem: str | None = None) -> None:
        self.folder = folder
        self.stem = stem
        self.parts: list[Part] = []

    def add(self, table: str, bucket: int, data: pa.Table) -> None:
        """Writes `data` as the next part of a bucket; an empty table writes nothing."""
        if not data.num_rows:
            return
        scratch = self.folder / f"{unfinished(f'{table}-{bucket}-')}.parquet"
        write_parquet(data, scratch)
        sha256 = file_hash(scratch)
        name = f"{self.stem or f'{table}-b{bucket:04d}'}-{sha256[:16]}.parquet"
        there = self.folder / name
        if there.exists() and file_hash(there) == sha256:  # keep the inode that readers may hold
            scratch.unlink()
        else:
            scratch.replace(there)
        self.parts.append(Part(table, bucket, name, data.num_rows, sha256))


def no_rows(schema: pa.Schema) -> pa.Table:
    """An empty table. `schema.empty_table()` looks for pandas, which takes a third of a second."""
    return pa.Table.from_batches([], schema)


def read_bucket(
    folder: Path,
    manifest: Manifest,
    table: str,
    bucket: int,
    *,
    schema: pa.Schema,
    columns: list[str] | None = None,
) -> pa.Table:
    """Reads all parts of one bucket of one table; no parts give an empty table of `schema`.

    Raises:
        ValueError: if a part is not what the manifest says; see `verified.read_parquet`.
    """
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    tables = [
        read_part(folder, part, schema=schema, columns=columns)
        for part in manifest.parts
        if part.table == table and part.bucket == bucket
    ]
    return pa.concat_tables(tables) if tables else no_rows(wanted)


def read_part(
    folder: Path,
    part: Part,
    *,
    schema: pa.Schema | None = None,
    columns: list[str] | None = None,
) -> pa.Table:
    """Reads one part of a manifest; without a schema its columns are taken as they are."""
    path = folder / part.file
    return read_parquet(path, part.sha256, rows=part.rows, schema=schema, columns=columns)


def write_named(table: pa.Table, folder: Path, stem: str) -> None:
    """Writes a table as the one file `stem-<hash>.parquet` of a folder; see `read_named`."""
    PartWriter(folder, stem).add(stem, 0, table)


def read_named(folder: Path, stem: str) -> pa.Table | None:
    """Reads the file of `write_named`; None where there is none.

    Raises:
        ValueError: if it is not what its name says, or there are two.
    """
    paths = sorted(folder.glob(f"{stem}-*.parquet"))
    if not paths:
        return None
    if len(paths) > 1:
        raise AlteredError(f"{paths[0]} and {paths[1].name} say the same twice: delete both")
    return read_parquet(paths[0], named_hash(paths[0]))


class RowHash:
    """sha256 over rows in order; how they are cut into tables does not matter."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, table: pa.Table) -> None:
        """Adds the rows of one table."""
        for row in table.to_pylist():
            self._digest.update(canonical_json(row).encode())
            self._digest.update(b"\n")

    def hexdigest(self) -> str:
        """64 hex digits."""
        return self._digest.hexdigest()


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
        used: Which optional fields some row fills; see `conversations.used_fields`, and `tools`.
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
