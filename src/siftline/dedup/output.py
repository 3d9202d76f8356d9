"""What a run of deduplication leaves: kept rows in `data/`, others, with reasons, in `removed/`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from siftline.dedup.arrow import arrow_of, without_views
from siftline.dedup.engine import Deduplicated
from siftline.dedup.files import PieceWriter, Table, ahead, read_pieces, with_columns
from siftline.progress import Tracker

_FROM = np.array([1, 2, 3, 5, 100, 1000])
_TIMES = np.array([1, 2, 3, 5, 8, 1])
_BOX = 5


def published(sizes: np.ndarray) -> np.ndarray:
    """Repeats by the simple rule: 1:1, 2:2, 3-4:3, 5-99:5, 100-999:8, from 1000 on 1.

    Args:
        sizes: Cluster sizes of kept rows, at least 1, shape (n,).

    Returns:
        int64, shape (n,).
    """
    assert (sizes >= 1).all(), "a kept row counts itself"
    return _TIMES[np.searchsorted(_FROM, sizes, side="right") - 1].astype(np.int64)


def fitted(rates: Sequence[float], overall: float, most: int) -> np.ndarray:
    """Repeats for ascending cluster sizes from how many rows of each size a filter removes.

    The size with the lowest rate is repeated `most` times, sizes at or above the overall rate once,
    and others in proportion; then a mean over five neighbours, except at the two sizes on either
    end, and rounding half to even. Fewer than five sizes are not smoothed. (There the original
    takes a mean over more places than there are, by numpy's "same" mode; that is not repeated.)

    Args:
        rates: Share of rows removed, in [0, 1], for each cluster size.
        overall: Share removed of all rows.
        most: Repeats at the lowest rate, at least 1.

    Returns:
        int64, shape (len(rates),).

    Raises:
        ValueError: if a rate is not in [0, 1], or `most` is below 1.
    """
    rate = np.asarray(rates, np.float64)
    if not ((rate >= 0) & (rate <= 1)).all() or not 0 <= overall <= 1:
        raise ValueError(f"rates={list(rates)} and overall={overall} must lie in [0, 1]")
    if most < 1:
        raise ValueError(f"most={most} must be at least 1")
    lowest = rate.min(initial=overall)
    repeats = np.ones(len(rate))
    below = rate < overall
    repeats[below] += (most - 1) * (rate[below] - overall) / (lowest - overall)
    if len(rate) >= _BOX:
        repeats[2:-2] = np.convolve(repeats, np.full(_BOX, 1 / _BOX), "valid")
    return np.round(repeats).astype(np.int64)


DATA, REMOVED = "data", "removed"
MakeTracker = Callable[[str, int, str], Tracker]
NO_COLUMNS: Mapping[str, pa.Array] = {}


def claim(out: Path) -> None:
    """Checks that a folder can be written to.

    Raises:
        ValueError: if it holds anything, or is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder")
    if out.exists():
        if any(out.iterdir()):
            raise ValueError(f"{out} is not empty: name a new folder, or empty this one")
        out.rmdir()


def summary(result: Deduplicated, rows: np.ndarray | None = None) -> dict[str, Any]:
    """The facts of a run, as the command line prints them.

    Args:
        result: Decisions.
        rows: Count only these, and the clusters that they are in; pairs are of the run either way.
    """
    kept = result.kept if rows is None else result.kept[rows]
    exact = result.exact if rows is None else result.exact[rows]
    return {
        "rows": len(kept),
        "kept": int(kept.sum()),
        "removed": int((~kept).sum()),
        "exact": int(exact.sum()),
        "clusters": result.clusters if rows is None else result.clusters_of(rows),
        "pairs_verified": result.pairs,
    }


def first_rows(tables: Sequence[Table]) -> np.ndarray:
    """Number of each table's first row, and of all rows; int64, shape (tables + 1,)."""
    return np.cumsum([0, *(table.rows for table in tables)]).astype(np.int64)


def row_names(tables: Sequence[Table], starts: np.ndarray) -> Callable[[np.ndarray], list[str]]:
    """Names rows by file and 0-based row number."""

    def named(rows: np.ndarray) -> list[str]:
        where = np.searchsorted(starts, rows, side="right") - 1
        numbers = rows - starts[where]
        pairs = zip(where.tolist(), numbers.tolist(), strict=True)
        return [f"{tables[t].name}:{number}" for t, number in pairs]

    return named


def write_out(
    folder: Path,
    tables: Sequence[Table],
    starts: np.ndarray,
    result: Deduplicated,
    named: Callable[[np.ndarray], list[str]],
    make_tracker: MakeTracker,
    rehydrate: bool = False,
    more: Mapping[str, pa.Array] = NO_COLUMNS,
    read: Callable[[Table], Iterator[pa.RecordBatch]] = read_pieces,
) -> None:
    """Writes `data/` and `removed/`, one file of each for every table.

    Args:
        folder: Where to.
        tables: Input files.
        starts: Number of each one's first row in `result`.
        result: Decisions.
        named: Names rows of `result`.
        make_tracker: Takes label, total and unit of a step.
        rehydrate: Also write how often to repeat a row.
        more: Columns to add, of all rows of `result`.
        read: Gives the rows of a table.
    """
    tracker = make_tracker("write", sum(table.rows for table in tables), "rows")
    names = ["sift_cluster_size", *(["sift_weight"] if rehydrate else [])]
    both = [pa.field(name, values.type) for name, values in more.items()]
    clusters = [*both, *(pa.field(name, pa.int64()) for name in names)]
    facts = [
        *both,
        pa.field("sift_reason", pa.string()),
        pa.field("sift_matched_row", pa.string()),
        pa.field("sift_similarity", pa.float64()),
    ]
    for name in (DATA, REMOVED):
        (folder / name).mkdir()
    try:
        for k, table in enumerate(tables):
            file = f"part-{k:05d}.parquet"
            kept_schema = with_columns(table.schema, clusters)
            gone_schema = with_columns(table.schema, facts)
            with (
                PieceWriter(folder / DATA / file, kept_schema) as kept,
                PieceWriter(folder / REMOVED / file, gone_schema) as gone,
            ):
                at = int(starts[k])
                for batch in ahead(read(table)):
                    rows = np.arange(at, at + batch.num_rows)
                    mine = [values.slice(at, batch.num_rows) for values in more.values()]
                    at += batch.num_rows
                    stays = result.kept[rows]
                    sizes = result.cluster_size[rows[stays]]
                    added = [sizes, *([published(sizes)] if rehydrate else [])]
                    kept.add(_extended(batch, stays, mine, added, kept.schema))
                    lost = rows[~stays]
                    if len(lost):
                        why = _reasons(result, lost, named)
                        gone.add(_extended(batch, ~stays, mine, why, gone.schema))
                    tracker.advance(batch.num_rows)
    finally:
        tracker.close()


def _extended(
    batch: pa.RecordBatch,
    rows: np.ndarray,
    more: Sequence[pa.Array],
    added: Sequence[Any],
    schema: pa.Schema,
) -> pa.RecordBatch:
    """Some rows of a batch with more columns, as `schema` has them.

    `more` has a value for every row of the batch, `added` for those that are wanted.
    """
    if rows.all():
        arrays = [*batch.columns, *more]
    else:
        wanted = arrow_of(rows)
        arrays = [*without_views(batch).filter(wanted).columns, *(c.filter(wanted) for c in more)]
    arrays += map(arrow_of, added)
    typed = [
        values if values.type == kind else values.cast(kind)
        for values, kind in zip(arrays, schema.types, strict=True)
    ]
    return pa.RecordBatch.from_arrays(typed, schema=schema)


def _reasons(
    result: Deduplicated, lost: np.ndarray, named: Callable[[np.ndarray], list[str]]
) -> list[Any]:
    reason = np.where(result.exact[lost], "exact_duplicate", result.reason).tolist()
    return [reason, named(result.matched[lost]), result.similarity[lost]]
