"""What a run of deduplication leaves: kept rows in `data/`, others, with reasons, in `removed/`.

How often to repeat a kept row, from the size of its cluster (FineWeb2's "rehydration").
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from siftline.deduplication.arrow import arrow_of, without_views
from siftline.deduplication.engine import Deduplicated
from siftline.deduplication.files import PieceWriter, Table, ahead, read_pieces, with_columns
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
FACTS = (
    pa.field("sift_reason", pa.string()),
    pa.field("sift_value", pa.float64()),
    pa.field("sift_threshold", pa.float64()),
    pa.field("sift_matched_id", pa.string()),
    pa.field("sift_matched_row", pa.string()),
    pa.field("sift_similarity", pa.float64()),
)
"""Columns of removed rows."""
MakeTracker = Callable[[str, int, str], Tracker]


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
    """Names rows by file and number; the first of a file is 1."""

    def named(rows: np.ndarray) -> list[str]:
        where = np.searchsorted(starts, rows, side="right") - 1
        numbers = rows - starts[where] + 1
        pairs = zip(where.tolist(), numbers.tolist(), strict=True)
        return [f"{tables[t].name}:{number}" for t, number in pairs]

    return named


@dataclass(frozen=True)
class Part:
    """Some rows of all tables, and what is said of them.

    Attributes:
        name: The folder that they are written to.
        rows: bool, one value a row of all tables.
        fields: Columns that are added.
        values: Their values of some of the rows, given by number.
    """

    name: str
    rows: np.ndarray
    fields: tuple[pa.Field, ...] = ()
    values: Callable[[np.ndarray], Sequence[Any]] = lambda rows: ()


def parts_of(
    result: Deduplicated,
    threshold: float,
    named: Callable[[np.ndarray], list[str]],
    rehydrate: bool = False,
) -> list[Part]:
    """Kept and removed texts.

    Args:
        result: Decisions.
        threshold: Similarity from which rows went.
        named: Names rows of `result`.
        rehydrate: Also say how often to repeat a row.
    """

    def sizes(rows: np.ndarray) -> list[Any]:
        found = result.cluster_size[rows]
        return [found, published(found)] if rehydrate else [found]

    def reasons(rows: np.ndarray) -> list[Any]:
        exact, similar = result.exact[rows], result.similarity[rows]
        reason = np.where(exact, "exact_duplicate", result.reason).tolist()
        limit = np.where(exact, 1.0, threshold)
        return [reason, similar, limit, named(result.matched[rows]), similar]

    names = ["sift_cluster_size", *(["sift_weight"] if rehydrate else [])]
    clusters = tuple(pa.field(name, pa.int64()) for name in names)
    facts = tuple(field for field in FACTS if field.name != "sift_matched_id")
    return [Part(DATA, result.kept, clusters, sizes), Part(REMOVED, ~result.kept, facts, reasons)]


def write_out(
    folder: Path,
    tables: Sequence[Table],
    starts: np.ndarray,
    parts: Sequence[Part],
    make_tracker: MakeTracker,
    read: Callable[[Table], Iterator[pa.RecordBatch]] = read_pieces,
) -> None:
    """Writes the rows of each part to a folder, one file for every table.

    Args:
        folder: Where to.
        tables: Input files.
        starts: Number of each one's first row in the parts.
        parts: Which rows go where.
        make_tracker: Takes label, total and unit of a step.
        read: Gives the rows of a table.
    """
    tracker = make_tracker("write", sum(table.rows for table in tables), "rows")
    for part in parts:
        (folder / part.name).mkdir()
    try:
        for k, table in enumerate(tables):
            with ExitStack() as opened:
                writers = [
                    opened.enter_context(
                        PieceWriter(
                            folder / part.name / f"part-{k:05d}.parquet",
                            with_columns(table.schema, part.fields),
                        )
                    )
                    for part in parts
                ]
                at = int(starts[k])
                for batch in ahead(read(table)):
                    rows = np.arange(at, at + batch.num_rows)
                    at += batch.num_rows
                    for part, writer in zip(parts, writers, strict=True):
                        wanted = part.rows[rows]
                        if wanted.any():
                            more = part.values(rows[wanted])
                            writer.add(_extended(batch, wanted, more, writer.schema))
                    tracker.advance(batch.num_rows)
    finally:
        tracker.close()


def _extended(
    batch: pa.RecordBatch, rows: np.ndarray, added: Sequence[Any], schema: pa.Schema
) -> pa.RecordBatch:
    """Some rows of a batch with more columns, as `schema` has them; `added` is of those rows."""
    if rows.all():
        arrays = list(batch.columns)
    else:
        arrays = list(without_views(batch).filter(arrow_of(rows)).columns)
    arrays += [values if isinstance(values, pa.Array) else arrow_of(values) for values in added]
    typed = [
        values if values.type == kind else values.cast(kind)
        for values, kind in zip(arrays, schema.types, strict=True)
    ]
    return pa.RecordBatch.from_arrays(typed, schema=schema)
