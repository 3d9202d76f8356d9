"""What the API is given and gives back: frames, datasets, lists of dicts, files.

Every form is handed to ingestion as files that its one reader knows: frames and datasets as Arrow
files in a scratch folder, lists of dicts as JSONL, paths as they are. What comes back is taken out
of the object that was given, so that its order, index and other columns stay. Frames of all
libraries are handled by narwhals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from siftline.api.judge import Read
from siftline.api.output import FACT_NAMES, file_records, in_tables, unread_lines
from siftline.deduplication.arrow import NoTableError
from siftline.deduplication.files import Table, open_read, read_pieces, shown
from siftline.ingest.files import input_files
from siftline.ingest.source import Source

Columns = Mapping[str, Sequence[Any]]
"""Columns to be added, each with a value for every row that is taken."""
ROWS = "data"
"""What rows of frames and lists are called: data:1 is the first."""
_SPLITS = "DatasetDict"


@dataclass(frozen=True)
class Given:
    """Rows in whatever form, as ingestion reads them and as they are given back.

    Attributes:
        sources: What is read.
        names: For each file that is read, what its rows are called.
        columns: Names of the columns, in order; empty where files are only known once read.
        rows: How many; None of files.
        take: Gives some rows, by their places from 0 in ascending order, in the form they came in,
            with more columns. None of files, until `read_whole`.
        column: Gives a column as an Arrow array.
        tables: Gives the rows as tables that can be written, from a scratch folder and what was
            decided; of files, set by `read_whole`.
    """

    sources: tuple[Source, ...]
    names: tuple[str, ...]
    columns: tuple[str, ...] = ()
    rows: int | None = None
    take: Callable[[np.ndarray, Columns], Any] | None = None
    column: Callable[[str], Any] | None = None
    tables: Callable[[Path, Read], list[Table]] | None = None

    def records(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Some rows as dicts."""
        assert self.take is not None
        found = []
        for place in places:
            found += as_records(self.take(np.array([place], np.int64), {}))
        return found


def given(data: Any, scratch: Path, source: Source, name: str = ROWS) -> Given:
    """Prepares what a user gave.

    Args:
        data: A frame (polars, pandas, pyarrow, and whatever else narwhals knows), a
            `datasets.Dataset` or `DatasetDict`, a list of dicts, a path, or a list of paths.
        scratch: Folder for what has to be written to be read; made where it is needed.
        source: How rows are read; its path is not looked at.
        name: What its rows are called, and their source where no column says another.

    Raises:
        ValueError: if it is something else, holds no rows, or values that no table can hold.
    """
    if isinstance(data, str | Path):
        return Given((replace(source, path=str(data)),), ())
    if _is_of(data, "datasets"):
        return _dataset(data, scratch, source, name)
    if isinstance(data, Mapping):
        raise ValueError(_UNKNOWN.format("a dict"))
    if isinstance(data, list | tuple):
        if data and all(isinstance(item, str | Path) for item in data):
            return Given(tuple(replace(source, path=str(item)) for item in data), ())
        return _dicts(list(data), scratch, source, name)
    return _frame(data, scratch, source, name)


_UNKNOWN = (
    "{} is no table: give a polars, pandas or pyarrow table, a datasets.Dataset, a list of dicts "
    "(one a row), or the path of a file"
)


def _is_of(data: Any, package: str) -> bool:
    return type(data).__module__.partition(".")[0] == package


def _checked(columns: Sequence[str], rows: int) -> tuple[str, ...]:
    if not rows:
        raise ValueError("there are no rows: give at least one")
    for name in columns:
        if name in FACT_NAMES:
            raise ValueError(f"there is a column {name} already: drop or rename it")
    return tuple(columns)


# ---- lists of dicts ------------------------------------------------------------------------------


def _dicts(data: list[Any], scratch: Path, source: Source, name: str) -> Given:
    import orjson

    for number, item in enumerate(data):
        if not isinstance(item, Mapping):
            raise ValueError(f"item {number} of the list is {type(item).__name__}: give dicts")
    columns = _checked([*dict.fromkeys(key for item in data for key in item)], len(data))
    path = _place(scratch, f"{name}.jsonl")
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
    with path.open("wb") as stream:
        for number, item in enumerate(data):
            try:
                stream.write(orjson.dumps(item, default=_plain, option=options))
            except TypeError as error:
                raise ValueError(f"item {number} of the list is no JSON ({error})") from error

    def take(places: np.ndarray, more: Columns) -> list[dict[str, Any]]:
        return _with_columns([data[k] for k in places.tolist()], more)

    def column(wanted: str) -> pa.Array:
        try:
            return pa.array([item.get(wanted) for item in data])
        except (pa.ArrowException, TypeError) as error:
            raise ValueError(f"column {wanted!r} holds values of several kinds") from error

    def tables(folder: Path, judged: Read) -> list[Table]:
        again = _dicts(data, folder, source, name).sources
        return open_read(input_files(again), unread_lines(judged) or [()], folder / "open", ())

    read = (_read(source, path, "jsonl"),)
    return Given(read, (name,), columns, len(data), take, column, tables)


def _plain(value: Any) -> Any:
    """What JSON has no word for: sets and mappings of other kinds."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def _place(scratch: Path, name: str) -> Path:
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch / name


def _read(source: Source, path: Path, form: Any) -> Source:
    return replace(source, path=str(path), format=form)


# ---- datasets ------------------------------------------------------------------------------------


def _dataset(data: Any, scratch: Path, source: Source, name: str) -> Given:
    splits = dict(data) if type(data).__name__ == _SPLITS else {name: data}
    for split, rows in splits.items():
        _write_split(rows, _place(scratch, f"{split}.arrow"))
    sizes = [len(rows) for rows in splits.values()]
    ends = np.cumsum([0, *sizes])

    def take(places: np.ndarray, more: Columns) -> Any:
        parts = {}
        for k, (split, rows) in enumerate(splits.items()):
            mine = (places >= ends[k]) & (places < ends[k + 1])
            part = rows.select(places[mine] - ends[k])
            for added, values in more.items():
                kept = [v for v, m in zip(values, mine.tolist(), strict=True) if m]
                part = part.add_column(added, _array(added, kept))
            parts[split] = part
        return type(data)(parts) if type(data).__name__ == _SPLITS else parts[name]

    def column(wanted: str) -> pa.ChunkedArray:
        parts = [table.select([wanted]) for rows in splits.values() for table in _batches(rows)]
        return pa.concat_tables(parts).column(wanted)

    files = tuple(_read(source, scratch / f"{split}.arrow", "arrow") for split in splits)
    first = next(iter(splits.values()))
    columns = tuple(first.column_names)

    def tables(folder: Path, judged: Read) -> list[Table]:
        whole = {split: pa.concat_tables(list(_batches(rows))) for split, rows in splits.items()}
        return _stored(whole, folder)

    return Given(files, tuple(splits), columns, int(ends[-1]), take, column, tables)


def _write_split(rows: Any, path: Path) -> None:
    if type(rows).__name__ != "Dataset":
        raise ValueError(f"{type(rows).__name__} can't be read twice: load it without streaming")
    _checked(rows.column_names, len(rows))
    batches = _batches(rows)
    first = next(batches)
    with pa.ipc.new_file(str(path), first.schema) as writer:
        for table in chain([first], batches):
            writer.write_table(table)


def _batches(rows: Any) -> Any:
    return rows.with_format("arrow").iter(batch_size=10_000)


_KINDS = {
    "sift_value": pa.float64(),
    "sift_threshold": pa.float64(),
    "sift_similarity": pa.float64(),
}


def _array(name: str, values: Sequence[Any]) -> pa.Array:
    """A column of what was decided; its type does not depend on the values."""
    return pa.array(list(values), _KINDS.get(name, pa.string()))


# ---- frames --------------------------------------------------------------------------------------


def _frame(data: Any, scratch: Path, source: Source, name: str) -> Given:
    import narwhals as nw

    if isinstance(data, pa.RecordBatch):
        data = pa.Table.from_batches([data])
    try:
        frame = nw.from_native(data)
    except TypeError:
        raise ValueError(_UNKNOWN.format(type(data).__name__)) from None
    if isinstance(frame, nw.LazyFrame):
        frame = frame.collect()
    columns = _checked([str(column) for column in frame.columns], len(frame))
    table = _arrow(frame)
    if table is None:  # values of several kinds in one column
        rows = [{k: _missing(v) for k, v in row.items()} for row in frame.iter_rows(named=True)]
        listed = _dicts(rows, scratch, source, name)
        read, column, tables = listed.sources[0], listed.column, listed.tables
    else:
        path = _place(scratch, f"{name}.arrow")
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=10_000)
        read = _read(source, path, "arrow")

        def column(wanted: str) -> Any:
            return table.column(wanted)

        def tables(folder: Path, judged: Read) -> list[Table]:
            return _stored({name: table}, folder)

    def take(places: np.ndarray, more: Columns) -> Any:
        part = frame[places.tolist()] if len(places) else frame.head(0)
        for added, values in more.items():
            kind = nw.Float64() if added in _KINDS else nw.String()
            made = nw.new_series(added, list(values), kind, backend=part.implementation)
            part = part.with_columns(made)
        return part.to_native()

    return Given((read,), (name,), columns, len(frame), take, column, tables)


def _arrow(frame: Any) -> pa.Table | None:
    """The rows as Arrow, without an index; None where Arrow has no type for a column."""
    native = frame.to_native()
    if isinstance(native, pa.Table):
        return native
    try:
        if _is_of(native, "pandas"):
            return pa.Table.from_pandas(native, preserve_index=False).replace_schema_metadata()
        return frame.to_arrow()
    except (pa.ArrowException, TypeError, OverflowError):
        return None


def _missing(value: Any) -> Any:
    """NaN, NaT and the like as null."""
    return None if value is not None and np.isscalar(value) and value != value else value


def as_records(rows: Any) -> list[dict[str, Any]]:
    """Rows of any form that `given` takes as dicts."""
    if isinstance(rows, list):
        return rows
    if _is_of(rows, "datasets"):
        if type(rows).__name__ == _SPLITS:
            return [row for part in rows.values() for row in part.to_list()]
        return list(rows.to_list())
    import narwhals as nw

    return list(nw.from_native(rows, eager_only=True).iter_rows(named=True))


# ---- files ---------------------------------------------------------------------------------------


def read_whole(rows: Given, judged: Read, scratch: Path) -> Given:
    """Files that were judged, read again to be given back as a polars frame.

    Args:
        rows: What was given; anything but files is there already.
        judged: What was decided.
        scratch: Folder for what other formats than Parquet are converted to.

    Raises:
        ValueError: if lines or files differ in kind, so that no table holds them.
    """
    if rows.take is not None:
        return rows
    names = tuple(map(shown, judged.files))
    try:
        opened = open_read(judged.files, unread_lines(judged), scratch, FACT_NAMES)
    except NoTableError as error:
        return _listed(judged, error, replace(rows, names=names))
    return replace(in_memory(opened, in_tables(judged)), sources=rows.sources, names=names)


def _listed(judged: Read, error: NoTableError, rows: Given) -> Given:
    """Records of several kinds as a list of dicts."""
    found = dict(file_records(judged))

    def take(places: np.ndarray, more: Columns) -> list[dict[str, Any]]:
        picked = [found[place] for place in places.tolist()]
        return _with_columns(picked, more)

    def tables(folder: Path, read: Read) -> list[Table]:
        raise error

    columns = tuple(dict.fromkeys(name for record in found.values() for name in record))
    return replace(rows, columns=columns, rows=judged.lines.height, take=take, tables=tables)


def _with_columns(rows: list[dict[str, Any]], more: Columns) -> list[dict[str, Any]]:
    if not more:
        return rows
    extra = zip(*more.values(), strict=True)
    return [
        {**row, **dict(zip(more, values, strict=True))}
        for row, values in zip(rows, extra, strict=True)
    ]


def in_memory(opened: Sequence[Table], there: np.ndarray) -> Given:
    """Tables of files as one frame.

    Args:
        opened: The tables.
        there: bool, one a row of the input: whether it is in the tables.
    """
    import polars as pl

    parts = [pa.Table.from_batches(read_pieces(table), table.schema) for table in opened]
    frame = pl.DataFrame(pl.from_arrow(pa.concat_tables(parts)))
    place = np.cumsum(there) - 1

    def take(places: np.ndarray, more: Columns) -> Any:
        assert there[places].all(), "a row that could not be read has no columns"
        part = frame[place[places].tolist()] if len(places) else frame.clear()
        return part.with_columns(
            pl.Series(name, list(values), pl.Float64 if name in _KINDS else pl.String)
            for name, values in more.items()
        )

    def column(wanted: str) -> Any:
        return pa.concat_tables(parts).column(wanted)

    def tables(folder: Path, judged: Read) -> list[Table]:
        return _stored(dict(zip((table.name for table in opened), parts, strict=True)), folder)

    names = tuple(table.name for table in opened)
    return Given((), names, tuple(frame.columns), len(there), take, column, tables)


def _stored(parts: Mapping[str, pa.Table], folder: Path) -> list[Table]:
    """Tables in memory as tables that can be written: each an Arrow file."""
    stored = []
    for number, (name, part) in enumerate(parts.items()):
        path = folder / f"{number}.arrow"
        with pa.ipc.new_file(str(path), part.schema) as writer:
            writer.write_table(part)
        stored.append(Table(name, part.num_rows, part.schema, chunks=(path,), schema=part.schema))
    return stored
