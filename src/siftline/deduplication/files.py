"""Tables on disk, read in pieces that fit into memory and written in pieces that read well."""

import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from siftline.disk import Sink
from siftline.rows.published import confirm_inputs

PIECE_BYTES = 32 << 20
"""Bytes of one piece, roughly."""
PIECE_ROWS = 1 << 16
KEPT_BYTES = 256 << 20
"""Bytes of tables that are kept between the readings rather than read again."""
UNPACKED = 3
"""Bytes in memory of one byte of converted text, roughly."""
ADDED = (
    "sift_cluster_size",
    "sift_weight",
    "sift_prompt_group",
    "sift_reason",
    "sift_value",
    "sift_threshold",
    "sift_matched_id",
    "sift_matched_row",
    "sift_similarity",
)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Table:
    """One input file.

    Attributes:
        name: As the user gave it, or its path where a folder or a pattern was given; names its
            rows.
        rows: Number of rows.
        own: Its columns.
        path: The file, where it is Parquet on this machine.
        chunks: Else the Arrow files it was converted to.
        schema: Columns of all tables together, which its rows are written with.
        repeated: Keys that stood in an object twice; the last counts.
    """

    name: str
    rows: int
    own: pa.Schema
    path: Path | None = None
    chunks: tuple[Path, ...] = ()
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    repeated: int = 0


def open_tables(names: Sequence[str], columns: Sequence[str], scratch: Path) -> list[Table]:
    """Opens every file and checks it before anything is computed.

    Args:
        names: Files, folders, patterns or URLs of any format that recipes read; Parquet files on
            this machine are read as they are. All tables get one schema.
        columns: Columns that each must have.
        scratch: Where files of other formats are converted to.

    Raises:
        ValueError: if a file is missing, unreadable, given twice, of another format, or lacks a
            column, or two files disagree about one.
    """
    places = _files(names)
    found = [_table(n, file, scratch / f"{k:05d}") for k, (n, file) in enumerate(places)]
    for table in found:
        _check(table, columns)
    return _of_one_schema(found)


def open_read(
    files: Sequence[Any],
    unread: Sequence[Collection[int]],
    scratch: Path,
    added: Collection[str] = ADDED,
) -> list[Table]:
    """Opens files that ingestion has read, to give their rows back.

    Args:
        files: As ingestion knows them (`ingest.files.InputFile`).
        unread: Of each file, lines that were no rows; those of text formats are left out.
        scratch: As in `open_tables`.
        added: Columns that will be added, so may not be there.

    Raises:
        ValueError: as `open_tables`.
    """
    found = []
    for k, (file, skip) in enumerate(zip(files, unread, strict=True)):
        local = file.format == "parquet" and Path(file.path).is_file()
        there = Path(file.path) if local else file
        found.append(_table(shown(file), there, scratch / f"{k:05d}", skip))
        _check(found[-1], (), added)
    return _of_one_schema(found)


def shown(file: Any) -> str:
    """What a file that ingestion knows is called: as the user gave it, or its path."""
    given = str(file.source.path)
    return given if Path(given).is_file() else str(file.path)


def _of_one_schema(found: list[Table]) -> list[Table]:
    if all(t.path and t.own.equals(found[0].own, check_metadata=True) for t in found):
        return [replace(table, schema=table.own) for table in found]
    from siftline.deduplication.arrow import check_storable, one_schema

    schema = one_schema((table.name, table.own) for table in found)
    for column in schema:
        name = next(table.name for table in found if column.name in table.own.names)
        check_storable(name, column.name, column.type)
    tables = [replace(table, schema=schema) for table in found]
    for table in tables:
        _check_numbers(table)
    return tables


def _files(names: Sequence[str]) -> list[tuple[str, Any]]:
    """Every file by its name; local Parquet as a path, others as the reader knows them.

    Raises:
        ValueError: if one is given twice, or there is none.
    """
    found: list[tuple[str, Any]] = []
    for name in names:
        if Path(name).suffix == ".parquet" and Path(name).is_file():
            found.append((name, Path(name)))
            continue
        from siftline.ingest.files import input_files
        from siftline.ingest.source import Source

        alone = Path(name).is_file()
        plain = "://" not in name and not any(mark in name for mark in ":*?[")
        if plain and not Path(name).exists():
            raise ValueError(f"{name} is not a file, and no folder either: name what is there")
        for file in input_files([Source(name)]):
            local = file.format == "parquet" and Path(file.path).is_file()
            found.append((name if alone else file.path, Path(file.path) if local else file))
    real = [os.path.realpath(name) for name, _ in found]
    for (name, _), path in zip(found, real, strict=True):
        if real.count(path) > 1:
            raise ValueError(f"{name} is given twice: name every file once")
    return found


def _table(name: str, file: Any, folder: Path, skip: Collection[int] = ()) -> Table:
    if not isinstance(file, Path):
        from siftline.deduplication.convert import to_chunks

        made = to_chunks(file, folder, skip)
        return Table(name, made.rows, made.schema, chunks=made.paths, repeated=made.repeated)
    confirm_inputs([file])
    try:
        with pq.ParquetFile(file) as opened:
            rows, schema = opened.metadata.num_rows, opened.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{name} is no readable Parquet file ({_line(error)}): write it again"
        ) from error
    return Table(name, rows, schema, path=file)


def _check(table: Table, columns: Sequence[str], added: Collection[str] = ADDED) -> None:
    names = table.own.names
    if len(set(names)) < len(names):
        raise ValueError(f"{table.name} has two columns of one name: rename one")
    _check_columns(table.name, names, columns)
    for column in added:
        if column in names:
            raise ValueError(f"{table.name} already has a column {column}: drop or rename it")


def _check_numbers(table: Table) -> None:
    """Refuses whole numbers that another table's floats would change."""
    from siftline.deduplication.arrow import narrowed
    from siftline.deduplication.convert import check_whole_numbers

    columns = narrowed(table.own, table.schema)
    if columns:
        check_whole_numbers(table.name, read_pieces(table, columns), table.own, table.schema)


def _check_columns(name: str, there: Sequence[str], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in there:
            raise ValueError(
                f"{name} has no column {column!r}, only {', '.join(there)}: name another"
            )


def read_pieces(table: Table, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a file in order, some megabytes at a time.

    Args:
        table: The file.
        columns: Only these, with the types they have in the file; by default all, with those of
            `table.schema`.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        yield from _pieces(table, columns)
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
    if table.path is None:  # mapped into memory and unpacked batch by batch
        return sum(path.stat().st_size * UNPACKED for path in table.chunks)
    with pq.ParquetFile(table.path) as file:
        facts = file.metadata
        return sum(facts.row_group(k).total_byte_size for k in range(facts.num_row_groups))


def _pieces(table: Table, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    names = None if columns is None else list(columns)
    if table.path is None:
        from siftline.deduplication.arrow import conformed_batch
        from siftline.deduplication.convert import read_chunks

        wanted = table.own if names is None else pa.schema([table.own.field(n) for n in names])
        batches: Iterator[pa.RecordBatch] = (
            conformed_batch(batch, wanted) for batch in read_chunks(table.chunks)
        )
    else:
        batches = _parquet_pieces(table.path, names)
    if names is not None or table.own.equals(table.schema):
        yield from batches
        return
    from siftline.deduplication.arrow import conformed_batch

    for batch in batches:
        yield conformed_batch(batch, table.schema)


def _parquet_pieces(path: Path, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(_piece_rows(file), columns=columns)


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
