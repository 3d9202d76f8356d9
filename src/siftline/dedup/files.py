"""Tables on disk, read in pieces that fit into memory and written in pieces that read well."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from siftline.disk import Sink
from siftline.published import confirm_inputs

PIECE_BYTES = 32 << 20
"""Bytes of one piece, roughly."""
PIECE_ROWS = 1 << 16
KEPT_BYTES = 256 << 20
"""Bytes of tables that are kept between the readings rather than read again."""
ADDED = (
    "sift_cluster_size",
    "sift_weight",
    "sift_prompt_group",
    "sift_reason",
    "sift_matched_row",
    "sift_similarity",
)
_JSONL = (".jsonl", ".ndjson")
_PACKED = (".gz", ".zst")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Table:
    """One input file.

    Attributes:
        name: As the user gave it; names its rows.
        path: Parquet: the file itself, or what it was converted to.
        rows: Number of rows.
        schema: Its columns.
    """

    name: str
    path: Path
    rows: int
    schema: pa.Schema


def open_tables(names: Sequence[str], columns: Sequence[str], scratch: Path) -> list[Table]:
    """Opens every file and checks it before anything is computed.

    Args:
        names: Paths of Parquet or JSONL files, the latter also packed with gzip or zstd; all JSONL
            files get one schema.
        columns: Columns that each must have.
        scratch: Where JSONL is converted to.

    Raises:
        ValueError: if a file is missing, unreadable, given twice, of another format, or lacks a
            column, or two JSONL files disagree about one.
    """
    real = [os.path.realpath(name) for name in names]
    for name, path in zip(names, real, strict=True):
        if real.count(path) > 1:
            raise ValueError(f"{name} is given twice: name every file once")
    for name in names:
        if not Path(name).is_file():
            raise ValueError(f"{name} is not a file: name Parquet or JSONL files")
    paths = _as_parquet(names, columns, scratch)
    return [_open(name, path, columns) for name, path in zip(names, paths, strict=True)]


def _as_parquet(names: Sequence[str], columns: Sequence[str], scratch: Path) -> list[Path]:
    """Where each file lies as Parquet; JSONL is converted for that."""
    for name in names:
        if not _is_jsonl(name) and Path(name).suffix != ".parquet":
            raise ValueError(f"{name} is neither .parquet nor .jsonl: convert or rename it")
    lines = [Path(name) for name in names if _is_jsonl(name)]
    if not lines:
        return [Path(name) for name in names]
    from siftline.dedup.jsonl import one_schema, schemas_of, to_parquet

    schemas = schemas_of(lines)
    for path, found in zip(lines, schemas, strict=True):
        _check_columns(str(path), found.names(), columns)  # one schema would hide its absence
    schema = one_schema(lines, schemas)
    paths = []
    for k, name in enumerate(names):
        paths.append(scratch / f"{k:05d}.parquet" if _is_jsonl(name) else Path(name))
        if _is_jsonl(name):
            to_parquet(Path(name), paths[k], schema)
    return paths


def _is_jsonl(name: str) -> bool:
    path = Path(name)
    plain = path.stem if path.suffix in _PACKED else path.name
    return Path(plain).suffix in _JSONL


def _open(name: str, path: Path, columns: Sequence[str]) -> Table:
    confirm_inputs([path])
    try:
        with pq.ParquetFile(path) as file:
            rows, schema = file.metadata.num_rows, file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{name} is no readable Parquet file ({_line(error)}): write it again"
        ) from error
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"{name} has two columns of one name: rename one")
    _check_columns(name, schema.names, columns)
    for column in ADDED:
        if column in schema.names:
            raise ValueError(f"{name} already has a column {column}: drop or rename it")
    return Table(name, path, rows, schema)


def _check_columns(name: str, there: Sequence[str], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in there:
            raise ValueError(
                f"{name} has no column {column!r}, only {', '.join(there)}: name another"
            )


def read_pieces(table: Table, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a file in order, some megabytes at a time.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with pq.ParquetFile(table.path) as file:
            size = _piece_rows(file)
            yield from file.iter_batches(size, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{table.name} is damaged ({_line(error)}): write it again and run again"
        ) from error


class Reader:
    """Reads tables as `read_pieces` does; small ones once, with all columns, and keeps them.

    What is decoded twice costs twice, and so does memory that is touched for the first time.

    Args:
        tables: All that are to be read.
        limit: Bytes that all of them together may take in memory to be kept.
    """

    def __init__(self, tables: Sequence[Table], limit: int = KEPT_BYTES) -> None:
        self._keeps = sum(map(_decoded_bytes, tables)) <= limit
        self._kept: dict[str, list[pa.RecordBatch]] = {}

    def __call__(
        self, table: Table, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The rows of a file in order, some megabytes at a time.

        Raises:
            ValueError: if the file is damaged.
        """
        if not self._keeps:
            yield from read_pieces(table, columns)
            return
        known = self._kept.get(table.name)
        batches: list[pa.RecordBatch] = []
        for batch in known if known is not None else read_pieces(table):
            batches.append(batch)
            yield batch if columns is None else batch.select(list(columns))
        self._kept[table.name] = batches  # only once all of it was read


def _decoded_bytes(table: Table) -> int:
    with pq.ParquetFile(table.path) as file:
        facts = file.metadata
        return sum(facts.row_group(k).total_byte_size for k in range(facts.num_row_groups))


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the next one made while the last is used."""
    with ThreadPoolExecutor(1) as pool:
        last = object()
        future = pool.submit(next, items, last)
        while (item := future.result()) is not last:
            future = pool.submit(next, items, last)
            yield item  # type: ignore[misc]


def _piece_rows(file: pq.ParquetFile) -> int:
    facts = file.metadata
    largest = 1.0
    for k in range(facts.num_row_groups):
        group = facts.row_group(k)
        largest = max(largest, group.total_byte_size / max(group.num_rows, 1))
    return max(1, min(PIECE_ROWS, int(PIECE_BYTES / largest)))


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass
class PieceWriter:
    """One Parquet file, written in row groups of some megabytes.

    Attributes:
        path: The file; its folder exists.
        schema: Its columns.
    """

    path: Path
    schema: pa.Schema
    _held: list[pa.RecordBatch] = field(default_factory=list)
    _bytes: int = 0
    _rows: int = 0

    def __enter__(self) -> "PieceWriter":
        self._sink = Sink(self.path)
        self._writer = pq.ParquetWriter(
            self._sink,
            self.schema,
            compression="zstd",
            write_page_index=True,
            use_content_defined_chunking=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._sink:
            if kind is None:
                self._flush()
            self._writer.close()

    def add(self, batch: pa.RecordBatch) -> None:
        """Appends rows."""
        if not batch.num_rows:
            return
        self._held.append(batch)
        self._bytes += batch.nbytes
        self._rows += batch.num_rows
        if self._bytes >= PIECE_BYTES or self._rows >= PIECE_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            table = pa.Table.from_batches(self._held, self.schema)
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
            self._sink.check()
        self._held, self._bytes, self._rows = [], 0, 0


def with_columns(schema: pa.Schema, added: Sequence[pa.Field]) -> pa.Schema:
    """A schema with more columns at its end.

    What the `datasets` library noted about the columns is dropped: it would not be true any more.
    """
    notes = {k: v for k, v in (schema.metadata or {}).items() if k != b"huggingface"}
    return pa.schema([*schema, *added], notes or None)
