"""Scores from outside: a column of a file, a field the row came with, or the user's own function.

Whoever has scores already brings them by row id, in a file, or leaves them in the input, where they
wait among the columns that no mapping used. A function that is named by its import path scores rows
in any way it likes.
"""

import importlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Number
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.schema import HALF_ID

NO_SCORE = "no_score"
"""Reason of a row that the file, the field or the function has no value for."""
LEFTOVER = "leftover"
"""Column of `attach_leftovers`."""
_ROW_ID = re.compile(rf"[0-9a-f]{{{2 * HALF_ID}}}")


@dataclass(frozen=True)
class Column:
    """A column of numbers that is there already.

    Attributes:
        column: Name of the column, or of the field in the row's unmapped input.
        path: Parquet, CSV or JSONL file (.parquet, .csv, .jsonl, .ndjson) with row ids. None reads
            the field that the row itself brought along.
        id: Name of the file's column of row ids.
    """

    column: str
    path: str | None = None
    id: str = "id"

    def __post_init__(self) -> None:
        if self.path is not None and Path(self.path).suffix not in _READERS:
            raise ValueError(f"path is {self.path!r}: give a file in {', '.join(sorted(_READERS))}")

    def input_columns(self) -> tuple[str, ...]:
        """The column of the pool's input that it reads, where it reads no file."""
        return () if self.path is not None else (self.column,)


@dataclass(frozen=True)
class Function:
    """A scorer of one's own.

    Attributes:
        path: Import path `package.module:function`, called as `function(rows, **args)` with the
            rows of one store bucket as dictionaries of `schema.ROW`, sorted by id. It returns one
            number a row, or None for a row that it cannot score, and must not depend on which
            rows stand together.
        args: Its further arguments.
    """

    path: str
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        module, colon, name = self.path.partition(":")
        if not (module and colon and name):
            raise ValueError(f"path is {self.path!r}: use package.module:function")

    def load(self) -> Callable[..., Any]:
        """Imports the function.

        Raises:
            ValueError: if it can't be imported or is not callable.
        """
        module, _, name = self.path.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"scorer {self.path!r} can't be imported: {error}") from error
        if not callable(found):
            raise ValueError(f"scorer {self.path!r} is not callable: give a function (rows)")
        return cast(Callable[..., Any], found)


def attach_leftovers(rows: pa.Table, provenance: pa.Table) -> pa.Table:
    """Rows with what their inputs held besides, for `Column` without a path.

    Args:
        rows: Column id.
        provenance: Columns id and leftover of `schema.PROVENANCE`; one line per copy of a row.

    Returns:
        `rows` with a column `leftover`: list of JSON objects, one per copy that has any, sorted.
    """
    held: dict[str, set[str]] = {}
    for line in provenance.select(["id", "leftover"]).to_pylist():
        if line["leftover"]:
            held.setdefault(line["id"], set()).add(line["leftover"])
    lists = [sorted(held.get(i, ())) for i in rows.column("id").to_pylist()]
    return rows.append_column(LEFTOVER, pa.array(lists, pa.list_(pa.string())))


def score_column(config: Column, rows: pa.Table) -> tuple[dict[str, float], dict[str, str]]:
    """Joins the column to rows.

    Args:
        config: The column.
        rows: Column id; and `leftover` (see `attach_leftovers`) where the column is the row's own.

    Returns:
        Values by id, and reasons by id (`no_score`, `not_finite`).

    Raises:
        ValueError: if the file or column is not there, ids are not row ids, a value is no number,
            or one id has different values.
    """
    ids = rows.column("id").to_pylist()
    if config.path is not None:
        path = Path(config.path).expanduser()
        if not path.is_file():
            raise ValueError(f"no score file at {config.path!r}: give an existing file")
        status = path.stat()
        table = _read_scores(
            str(path), config.id, config.column, status.st_mtime_ns, status.st_size
        )
        kept = table.filter(pl.col("id").is_in(ids))
        found: dict[str, float | None] = dict(kept.iter_rows())
        return split_values((i, found.get(i)) for i in ids)
    if LEFTOVER not in rows.column_names:
        raise ValueError(
            f"column {config.column!r} without a path is read from the input's unmapped columns, "
            "which these rows come without: give path"
        )
    held = zip(ids, rows.column(LEFTOVER).to_pylist(), strict=True)
    return split_values((i, _own_value(i, config.column, objects)) for i, objects in held)


def score_function(config: Function, rows: pa.Table) -> tuple[dict[str, float], dict[str, str]]:
    """Calls the function on the rows of one store bucket.

    Args:
        config: The function.
        rows: Columns of `schema.ROW`, sorted by id.

    Returns:
        Values by id, and reasons by id (`no_score`, `not_finite`).

    Raises:
        ValueError: if the function can't be imported, or returns another number of values or
            something that is no number.
        RuntimeError: if the function raises; with its path, from its error.
    """
    function = config.load()
    ids = rows.column("id").to_pylist()
    try:
        given = list(function(rows.to_pylist(), **config.args))
    except Exception as error:
        raise RuntimeError(f"scorer {config.path!r} failed: {error!r}") from error
    if len(given) != len(ids):
        raise ValueError(
            f"scorer {config.path!r} returned {len(given)} values for {len(ids)} rows: return one "
            "a row, None where there is none"
        )
    where = f"scorer {config.path!r}"
    return split_values(
        (i, None if value is None else _number(value, i, where))
        for i, value in zip(ids, given, strict=True)
    )


def split_values(
    pairs: Iterable[tuple[str, float | None]],
) -> tuple[dict[str, float], dict[str, str]]:
    """Finite values by id, and the reasons of the others: `no_score` for None, `not_finite`."""
    values: dict[str, float] = {}
    failed: dict[str, str] = {}
    for identity, value in pairs:
        if value is None:
            failed[identity] = NO_SCORE
        elif not np.isfinite(value):
            failed[identity] = "not_finite"
        else:
            values[identity] = value
    return values, failed


def _number(value: Any, identity: str, where: str) -> float:
    """A number, or a text that says one."""
    try:
        if isinstance(value, str | Number):
            return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{where}: id {identity} has {value!r:.80}, which is no number")


def _add(values: dict[str, float], identity: str, value: Any, where: str) -> None:
    """Adds a value unless it is empty; a second one must be the same."""
    if value is None or value == "":
        return
    number = _number(value, identity, where)
    known = values.setdefault(identity, number)
    if repr(known) != repr(number):  # NaN is not equal to itself
        raise ValueError(
            f"{where}: id {identity} has different values, {known} and {number}: keep one"
        )


def _own_value(identity: str, column: str, objects: Iterable[str]) -> float | None:
    """The field's value in a row's unmapped input; copies of a row must agree."""
    values: dict[str, float] = {}
    for text in objects:
        _add(values, identity, json.loads(text).get(column), f"column {column!r}")
    return values.get(identity)


@lru_cache(maxsize=4)
def _read_scores(path: str, key: str, column: str, changed: int, size: int) -> pl.DataFrame:
    """Columns id and value of a file, one line per id that has one; time and size key the cache."""
    values: dict[str, float] = {}
    for identity, value in _READERS[Path(path).suffix](Path(path), key, column):
        if not isinstance(identity, str) or not _ROW_ID.fullmatch(identity):
            raise ValueError(
                f"{path!r}: {identity!r} in column {key!r} is not a row id ({2 * HALF_ID} hex "
                "digits): take ids from the pool, or leave the scores in the input's own columns"
            )
        _add(values, identity, value, repr(path))
    schema = {"id": pl.String, "value": pl.Float64}
    return pl.DataFrame({"id": list(values), "value": list(values.values())}, schema=schema)


def _check_columns(path: Path, held: Iterable[str], wanted: Iterable[str]) -> None:
    held = sorted(held)
    for name in wanted:
        if name not in held:
            raise ValueError(f"{str(path)!r} has no column {name!r}: it has {', '.join(held)}")


def _parquet_pairs(path: Path, key: str, column: str) -> Iterable[tuple[Any, Any]]:
    _check_columns(path, pl.read_parquet_schema(path), (key, column))
    return pl.read_parquet(path, columns=[key, column]).select(key, column).iter_rows()


def _csv_pairs(path: Path, key: str, column: str) -> Iterable[tuple[Any, Any]]:
    # All as text: a hex id such as 12e5… would be read as a number.
    frame = pl.read_csv(path, infer_schema=False)
    _check_columns(path, frame.columns, (key, column))
    return frame.select(key, column).iter_rows()


def _jsonl_pairs(path: Path, key: str, column: str) -> Iterable[tuple[Any, Any]]:
    seen: set[str] = set()
    pairs = []
    with path.open(encoding="utf-8") as stream:
        for number, text in enumerate(stream, 1):
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{str(path)!r} line {number} is not JSON: {error}") from error
            if not isinstance(line, dict):
                raise ValueError(f"{str(path)!r} line {number} is no object: write one a line")
            seen |= set(line)
            pairs.append((line.get(key), line.get(column)))
    _check_columns(path, seen, (key, column))
    return pairs


_READERS: dict[str, Callable[[Path, str, str], Iterable[tuple[Any, Any]]]] = {
    ".parquet": _parquet_pairs,
    ".csv": _csv_pairs,
    ".jsonl": _jsonl_pairs,
    ".ndjson": _jsonl_pairs,
}
