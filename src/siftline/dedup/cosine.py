"""Cosine similarity, proposed in 32 bits and decided in 64, and the exact search among rows.

Products in 32 bits propose; the product of the two rows in 64 bits, to six decimals, decides. So
threads and block sizes change nothing, and equal vectors reach 1.
"""

from collections.abc import Iterator

import numpy as np

BLOCK, CHUNK = 1024, 4096
"""Rows searched for at once, and rows they are searched among at once."""
DECIMALS = 6
"""Of a similarity: units in 32 bits are no more exact."""
SLACK = 1e-4
"""More than sums in 32 bits differ by."""
_TINY = np.finfo(np.float64).tiny


class Exact:
    """Rows in keep order, and which of them later ones are held against.

    Args:
        unit: float32, shape (n, d); where copies are kept once, kept rows move to the front.
        threshold: Cosine similarity.
        drop_all: Hold every row against all others, not only against kept ones before it.
    """

    def __init__(self, unit: np.ndarray, threshold: float, drop_all: bool = False) -> None:
        self.unit, self.threshold, self.drop_all = unit, threshold, drop_all
        n = len(unit)
        self.held = np.arange(n)  # places in keep order of the rows at the front
        self.count = n if drop_all else 0
        self.room = np.empty(min(BLOCK, n) * min(CHUNK, n), np.float32)
        self.pairs = 0

    def all(self, block: int = BLOCK) -> Iterator[tuple[int, int, float]]:
        """Of each row that goes its place, the one it goes for, and how similar."""
        for start in range(0, len(self.unit), block):
            yield from self.block(start, min(start + block, len(self.unit)))

    def block(self, start: int, stop: int) -> Iterator[tuple[int, int, float]]:
        """The same of places start to stop; blocks come in order."""
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
        near = np.tril(rows @ rows.T >= self.threshold - SLACK, -1)
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
        if len(part) * len(rows) > len(self.room):
            return part @ rows.T >= self.threshold - SLACK
        room = self.room[: len(part) * len(rows)].reshape(len(part), len(rows))
        return np.matmul(part, rows.T, out=room) >= self.threshold - SLACK

    def _first(
        self, part: np.ndarray, rows: np.ndarray, near: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        found, value, pairs = first_similar(part, rows, near, self.threshold)
        self.pairs += pairs
        return found, value


def first_similar(
    part: np.ndarray, rows: np.ndarray, near: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Of each row of `part` the first of `rows` that is similar, or -1, and how similar.

    Args:
        part: float32 rows of length 1 or 0, shape (b, d).
        rows: The same, shape (c, d).
        near: bool, shape (b, c): who may be similar; is spent.
        threshold: Cosine similarity.

    Returns:
        int64 and float64, shape (b,), and how many pairs were computed.
    """
    found, value = np.full(len(part), -1, np.int64), np.zeros(len(part), np.float64)
    asked = np.flatnonzero(near.any(axis=1))
    pairs = 0
    while len(asked):
        first = near[asked].argmax(axis=1)
        cosine = cosines(part[asked], rows[first])
        pairs += len(asked)
        hit = cosine >= threshold
        found[asked[hit]], value[asked[hit]] = first[hit], cosine[hit]
        near[asked[~hit], first[~hit]] = False
        asked = asked[~hit]
        asked = asked[near[asked].any(axis=1)]
    return found, value, pairs


def unit_rows(embeddings: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows in an order, each of length 1 or 0; float32, made block by block.

    Raises:
        ValueError: if one is not finite.
    """
    out = np.empty((len(rows), embeddings.shape[1]), np.float32)
    for start in range(0, len(rows), CHUNK):
        asked = rows[start : start + CHUNK]
        part = np.asarray(embeddings[asked], np.float64)
        wrong = np.flatnonzero(~np.isfinite(part).all(axis=1))
        if len(wrong):
            raise ValueError(
                f"the embedding of row {asked[wrong[0]]:,} (counted from 0) is not finite: embed "
                "it again, or leave the row out"
            )
        # By the largest number first: squares of very large and very small ones are no numbers.
        part /= np.maximum(np.abs(part).max(axis=1, keepdims=True, initial=0), _TINY)
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), _TINY)
        out[start : start + CHUNK] = part
    return out


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Similarity of rows pair by pair, float64; the same for a pair whatever others there are."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    products = np.divide((a * b).sum(axis=1), lengths, out=lengths, where=lengths > 0)
    return np.clip(np.round(products, DECIMALS), -1.0, 1.0)
