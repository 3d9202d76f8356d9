"""Duplicates by meaning: cosine similarity of embeddings, the same decisions, the same result.

Two searches. `exact` holds rows in keep order, a block at a time, against the kept rows before
them, so m copies cost m comparisons; without copies it is n^2 d multiplications, about a minute for
100,000 rows of 384 and a hundred for a million. `faiss` holds a row against kept rows in the cells
nearest to it, so time grows with n^1.5 (see `cells`), and may miss a copy. Either removes a row
only for one that it was verified similar to.

Memory: `exact` holds the rows in 32 bits once more (1.5 GiB for a million of 384), and a few
blocks; `faiss` those that are kept, with room to grow (1 to 2 times that), and a few spans. A .npy
file is read from disk block by block; a column of vectors is in memory twice while it is read.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from siftline.dedup.cosine import BLOCK, DECIMALS, Exact, unit_rows
from siftline.dedup.engine import ranks
from siftline.dedup.result import Clock, Deduplicated

Nearest = Literal["exact", "faiss"]
MAX_ROWS = 1_000_000
"""Most rows of the exact search: an hour or two, which grows with their square."""
MAX_ROWS_FAISS = 10_000_000
"""Most rows of the other: an hour or two as well, and 15 to 31 GB where all of 384 are kept."""
REASON = "semantic_duplicate"


def check_rows(n: int, nearest: Nearest = "exact") -> None:
    """Refuses more rows than a search takes.

    Raises:
        ValueError: naming the remedy.
    """
    most = MAX_ROWS if nearest == "exact" else MAX_ROWS_FAISS
    if n > most:
        other = "search with faiss, " if n <= MAX_ROWS_FAISS else ""
        raise ValueError(
            f"{n:,} rows are more than the {most:,} whose embeddings are compared at once: {other}"
            "give the files by source or topic, or remove duplicates by their texts first"
        )


def semantic_duplicates(
    embeddings: np.ndarray,
    threshold: float = 0.95,
    *,
    priority: np.ndarray | None = None,
    drop_all: bool = False,
    nearest: Nearest = "exact",
    block: int = BLOCK,
) -> Deduplicated:
    """Finds rows whose embeddings point the same way.

    Args:
        embeddings: Shape (n, d), finite; length does not matter. A row of zeros resembles nothing.
        threshold: Cosine similarity in (0, 1], to six decimals, from which rows are duplicates.
        priority: Smaller is kept first, shape (n,); ties go by row.
        drop_all: Remove every row that has a duplicate, the first as well.
        nearest: `exact` finds all; `faiss` takes less time and may miss some, and where every copy
            goes it may name another of those that a row resembles.
        block: Rows searched for at once by `exact`.

    Raises:
        ValueError: if the array has another shape, is not finite, has more rows than the search
            takes, or the threshold is out of range.
    """
    if embeddings.ndim != 2 or embeddings.dtype.kind not in "fiu":
        said = f"{embeddings.dtype} of shape {embeddings.shape}"
        raise ValueError(f"embeddings are {said}: give numbers of shape (rows, width)")
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold={threshold} must be in (0, 1]")
    if nearest not in ("exact", "faiss"):
        raise ValueError(f"nearest={nearest!r} is no search: take exact or faiss")
    check_rows(len(embeddings), nearest)
    clock = Clock()
    n = len(embeddings)
    matched, similarity = np.full(n, -1, np.int64), np.zeros(n, np.float64)
    with clock.phase("search"):
        rank = ranks(priority)
        order = np.arange(n) if rank is None else np.argsort(rank, kind="stable")
        if nearest == "exact":
            exact = Exact(unit_rows(embeddings, order), threshold, drop_all)
            _take(exact.all(block), order, matched, similarity)
            pairs = exact.pairs
        else:
            pairs = _in_cells(embeddings, order, threshold, drop_all, matched, similarity)
    none = np.zeros(n, np.bool_)
    return Deduplicated(matched, similarity, none, pairs, clock.seconds, REASON)


def _take(
    found: Iterator[tuple[int, int, float]],
    order: np.ndarray,
    matched: np.ndarray,
    similarity: np.ndarray,
) -> None:
    """Writes down what a search finds, by row."""
    for place, other, value in found:
        matched[order[place]], similarity[order[place]] = order[other], value


def _in_cells(
    embeddings: np.ndarray,
    order: np.ndarray,
    threshold: float,
    drop_all: bool,
    matched: np.ndarray,
    similarity: np.ndarray,
) -> int:
    """Searches with faiss; returns the pairs computed."""
    from siftline.dedup.cells import Cells

    cells = Cells(embeddings, order, threshold)
    _take(cells.all(), order, matched, similarity)
    if drop_all:
        # A kept row goes as well where a row went for it, or where it resembles one that went.
        gone = np.flatnonzero(matched >= 0)
        firsts, which = np.unique(matched[gone], return_index=True)
        at = matched[order] < 0
        at[np.isin(order, firsts)] = False
        removed, alone = np.flatnonzero(matched[order] >= 0), np.flatnonzero(at)
        matched[firsts], similarity[firsts] = gone[which], similarity[gone[which]]
        _take(cells.chains(removed, alone), order, matched, similarity)
    return cells.pairs


def semantic_reference(embeddings: np.ndarray, threshold: float) -> list[int]:
    """`Deduplicated.matched` in row order by comparing each row with every kept one."""
    kept: list[int] = []
    matched = []
    length = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    for i, row in enumerate(embeddings.astype(np.float64)):
        products = [float(row @ embeddings[j]) / (length[i] * length[j] or np.inf) for j in kept]
        near = [j for j, p in zip(kept, products, strict=True) if round(p, DECIMALS) >= threshold]
        matched.append(near[0] if near else -1)
        if not near:
            kept.append(i)
    return matched


def vectors_of(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of numbers as an array, float32, shape (n, d).

    Raises:
        ValueError: if rows are missing or of different lengths, or hold no numbers.
    """
    if not len(column):
        return np.zeros((0, 1), np.float32)
    kind = column.type
    if not hasattr(kind, "value_type"):
        raise ValueError(f"a column of {kind} holds no embeddings: name one of lists of numbers")
    widths = pc.unique(pc.list_value_length(column)).to_pylist()
    if column.null_count or len(widths) != 1 or not widths[0]:
        raise ValueError("embeddings must be there for every row and of one width")
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(flat).astype(np.float32).reshape(len(column), widths[0])
