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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from siftline.disk import Sink, unfinished, writing
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
