"""Duplicates by meaning: cosine similarity of embeddings, the same decisions, the same result.

Exact search: rows go in keep order, a block at a time, against the kept rows before them (faiss,
flat inner product), so m copies cost m comparisons; without copies it is n^2 d multiplications,
about a minute for 100,000 rows of 384. What faiss proposes is decided by the product of the two
rows in 64 bits, so threads and block sizes change nothing.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from siftline.dedup.engine import ranks
from siftline.dedup.result import Clock, Deduplicated

BLOCK = 1024
REASON = "semantic_duplicate"
_SLACK = 1e-4  # more than 32-bit sums differ by


def semantic_duplicates(
    embeddings: np.ndarray,
    threshold: float = 0.95,
    *,
    priority: np.ndarray | None = None,
    drop_all: bool = False,
    block: int = BLOCK,
) -> Deduplicated:
    """Finds rows whose embeddings point the same way.

    Args:
        embeddings: Shape (n, d), finite; length does not matter. A row of zeros resembles nothing.
        threshold: Cosine similarity in (0, 1] from which rows are duplicates.
        priority: Smaller is kept first, shape (n,); ties go by row.
        drop_all: Remove every row that has a duplicate, the first as well.
        block: Rows searched for at once.

    Raises:
        ValueError: if the array has another shape, is not finite, or the threshold is out of range.
    """
    import faiss

    if embeddings.ndim != 2 or not np.isfinite(embeddings).all():
        raise ValueError(f"embeddings of shape {embeddings.shape} must be (rows, width) and finite")
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold={threshold} must be in (0, 1]")
    clock = Clock()
    n = len(embeddings)
    matched, similarity = np.full(n, -1, np.int64), np.zeros(n, np.float64)
    pairs = 0
    with clock.phase("search"):
        rank = ranks(priority)
        order = np.arange(n) if rank is None else np.argsort(rank, kind="stable")
        unit = _unit(embeddings)[order]
        index = faiss.IndexFlatIP(unit.shape[1])
        held: list[int] = []  # places in keep order of what the index holds
        if drop_all:
            index.add(unit)
            held = list(range(n))
        for start in range(0, n, block):
            part = unit[start : start + block]
            limits, _, found = index.range_search(part, threshold - _SLACK)
            among = part @ part.T >= threshold - _SLACK
            kept: list[int] = []  # of this block
            for k in range(len(part)):
                places = [held[j] for j in np.sort(found[limits[k] : limits[k + 1]])]
                if not drop_all:
                    places += [start + j for j in kept if among[k, j]]
                other, value, compared = _first(unit, start + k, places, threshold)
                pairs += compared
                if other < 0:
                    kept.append(k)
                    continue
                matched[order[start + k]], similarity[order[start + k]] = order[other], value
            if kept and not drop_all:
                index.add(part[kept])
                held += [start + j for j in kept]
    none = np.zeros(n, np.bool_)
    return Deduplicated(matched, similarity, none, pairs, clock.seconds, REASON)


def semantic_reference(embeddings: np.ndarray, threshold: float) -> list[int]:
    """`Deduplicated.matched` in row order by comparing each row with every kept one."""
    kept: list[int] = []
    matched = []
    unit = _unit(embeddings).astype(np.float64)
    for i, row in enumerate(unit):
        near = [j for j in kept if float(row @ unit[j]) >= threshold]
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


def _unit(embeddings: np.ndarray) -> np.ndarray:
    wide = embeddings.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.divide(wide, length, out=np.zeros_like(wide), where=length > 0).astype(np.float32)


def _first(
    unit: np.ndarray, row: int, places: list[int], threshold: float
) -> tuple[int, float, int]:
    """The first of some places that is similar to a row, how similar, and how many were tried."""
    mine = unit[row].astype(np.float64)
    for tried, place in enumerate(places, 1):
        value = float(mine @ unit[place].astype(np.float64))
        if place != row and value >= threshold:
            return place, min(value, 1.0), tried
    return -1, 0.0, len(places)
