"""Duplicates by meaning: cosine similarity of embeddings, the same decisions, the same result.

Exact search: rows go in keep order, a block at a time, against the kept rows before them, so m
copies cost m comparisons; without copies it is n^2 d multiplications, about a minute for 100,000
rows of 384 and a hundred for a million. Products in 32 bits propose; the product of the two rows in
64 bits, to six decimals, decides. So threads and block sizes change nothing, and equal vectors
reach 1.

Memory: the rows in 32 bits once more (1.5 GiB for a million of 384), and a few blocks. A .npy file
is read from disk block by block; a column of vectors is in memory twice while it is read.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from siftline.dedup.engine import ranks
from siftline.dedup.result import Clock, Deduplicated

BLOCK, CHUNK = 1024, 4096
"""Rows searched for at once, and rows they are searched among at once."""
MAX_ROWS = 1_000_000
"""Most rows: an hour or two, which grows with their square."""
DECIMALS = 6
"""Of a similarity: units in 32 bits are no more exact."""
REASON = "semantic_duplicate"
_SLACK = 1e-4  # more than 32-bit sums differ by


def check_rows(n: int) -> None:
    """Refuses more rows than can be compared all with all.

    Raises:
        ValueError: naming the remedy.
    """
    if n > MAX_ROWS:
        raise ValueError(
            f"{n:,} rows are more than the {MAX_ROWS:,} whose embeddings are compared at once: "
            "give the files by source or topic, or remove duplicates by their texts first"
        )


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
        threshold: Cosine similarity in (0, 1], to six decimals, from which rows are duplicates.
        priority: Smaller is kept first, shape (n,); ties go by row.
        drop_all: Remove every row that has a duplicate, the first as well.
        block: Rows searched for at once.

    Raises:
        ValueError: if the array has another shape, is not finite, has more than `MAX_ROWS` rows, or
            the threshold is out of range.
    """
    if embeddings.ndim != 2 or embeddings.dtype.kind not in "fiu":
        said = f"{embeddings.dtype} of shape {embeddings.shape}"
        raise ValueError(f"embeddings are {said}: give numbers of shape (rows, width)")
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold={threshold} must be in (0, 1]")
    check_rows(len(embeddings))
    clock = Clock()
    n = len(embeddings)
    matched, similarity = np.full(n, -1, np.int64), np.zeros(n, np.float64)
    pairs = 0
    with clock.phase("search"):
        rank = ranks(priority)
        order = np.arange(n) if rank is None else np.argsort(rank, kind="stable")
        search = _Search(_unit(embeddings, order), threshold, drop_all)
        for start in range(0, n, block):
            for place, other, value in search.block(start, min(start + block, n)):
                matched[order[place]], similarity[order[place]] = order[other], value
        pairs = search.pairs
    none = np.zeros(n, np.bool_)
    return Deduplicated(matched, similarity, none, pairs, clock.seconds, REASON)


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


class _Search:
    """Rows in keep order, and which of them later ones are held against.

    Args:
        unit: float32, shape (n, d); where copies are kept once, kept rows move to the front.
        threshold: Cosine similarity.
        drop_all: Hold every row against all others, not only against kept ones before it.
    """

    def __init__(self, unit: np.ndarray, threshold: float, drop_all: bool) -> None:
        self.unit, self.threshold, self.drop_all = unit, threshold, drop_all
        n = len(unit)
        self.held = np.arange(n)  # places in keep order of the rows at the front
        self.count = n if drop_all else 0
        self.room = np.empty((BLOCK, CHUNK), np.float32)
        self.pairs = 0

    def block(self, start: int, stop: int) -> Iterator[tuple[int, int, float]]:
        """Places start to stop: of each that goes its place, the one it goes for, and how similar.

        Blocks come in order.
        """
        part = self.unit[start:stop].copy()
        open_ = np.arange(len(part))
        for low in range(0, self.count, CHUNK):
            if not len(open_):
                return
            rows = self.unit[low : min(low + CHUNK, self.count)]
            near = self._near(part[open_], rows)
            if self.drop_all:
                own = start + open_ - low
                here = (own >= 0) & (own < len(rows))
                near[np.flatnonzero(here), own[here]] = False
            first, value = self._first(part[open_], rows, near)
            for k in np.flatnonzero(first >= 0):
                yield start + int(open_[k]), int(self.held[low + first[k]]), float(value[k])
            open_ = open_[first < 0]
        if not self.drop_all:
            yield from self._among(part, open_, start)

    def _among(
        self, part: np.ndarray, open_: np.ndarray, start: int
    ) -> Iterator[tuple[int, int, float]]:
        """Holds the rows of a block that are left against each other, and keeps what is kept."""
        rows = part[open_]
        near = np.tril(rows @ rows.T >= self.threshold - _SLACK, -1)
        kept = np.zeros(len(rows), np.bool_)
        for k in range(len(rows)):
            if near[k].any():
                first, value = self._first(rows[k : k + 1], rows, (near[k] & kept)[None])
                if first[0] >= 0:
                    other = start + int(open_[first[0]])
                    yield start + int(open_[k]), other, float(value[0])
                    continue
            kept[k] = True
        end = self.count + int(kept.sum())
        self.unit[self.count : end], self.held[self.count : end] = rows[kept], start + open_[kept]
        self.count = end

    def _near(self, part: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """bool, shape (part, rows): pairs that may be similar."""
        if len(part) > BLOCK:
            return part @ rows.T >= self.threshold - _SLACK
        room = self.room.ravel()[: len(part) * len(rows)].reshape(len(part), len(rows))
        return np.matmul(part, rows.T, out=room) >= self.threshold - _SLACK

    def _first(
        self, part: np.ndarray, rows: np.ndarray, near: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of each row of `part` the first of `rows` that is similar, or -1, and how similar.

        `near` says who may be, and is spent.
        """
        found, value = np.full(len(part), -1, np.int64), np.zeros(len(part), np.float64)
        asked = np.flatnonzero(near.any(axis=1))
        while len(asked):
            first = near[asked].argmax(axis=1)
            cosine = _cosine(part[asked], rows[first])
            self.pairs += len(asked)
            hit = cosine >= self.threshold
            found[asked[hit]], value[asked[hit]] = first[hit], cosine[hit]
            near[asked[~hit], first[~hit]] = False
            asked = asked[~hit]
            asked = asked[near[asked].any(axis=1)]
        return found, value


def _unit(embeddings: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The rows in an order, each of length 1 or 0; float32, made block by block.

    Raises:
        ValueError: if one is not finite.
    """
    out = np.empty(embeddings.shape, np.float32)
    for start in range(0, len(order), CHUNK):
        rows = order[start : start + CHUNK]
        part = np.asarray(embeddings[rows], np.float64)
        wrong = np.flatnonzero(~np.isfinite(part).all(axis=1))
        if len(wrong):
            raise ValueError(
                f"the embedding of row {rows[wrong[0]]:,} (counted from 0) is not finite: embed "
                "it again, or leave the row out"
            )
        # By the largest number first: squares of very large and very small ones are no numbers.
        part /= np.maximum(np.abs(part).max(axis=1, keepdims=True, initial=0), _TINY)
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), _TINY)
        out[start : start + CHUNK] = part
    return out


_TINY = np.finfo(np.float64).tiny


def _cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Similarity of rows pair by pair, float64; the same for a pair whatever others there are."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    products = np.divide((a * b).sum(axis=1), lengths, out=lengths, where=lengths > 0)
    return np.clip(np.round(products, DECIMALS), -1.0, 1.0)
