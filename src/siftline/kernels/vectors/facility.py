"""Facility location: rows such that every row has one of them near.

The value of a set is the sum, over the rows to cover, of the largest similarity to a member; it is
monotone and submodular, so taking the largest gain each time is within 1 - 1/e of the best
(Nemhauser et al. 1978). `lazy_greedy` does that exactly on a matrix (Minoux 1978);
`stochastic_greedy` looks at a random part of the rows each time and reaches 1 - 1/e - eps in
expectation (Mirzasoleiman et al. 2015, arXiv 1409.7938), computing similarities as it goes.
"""

import heapq
from dataclasses import dataclass
from functools import partial

import numpy as np

from siftline.kernels.vectors.blocks import pooled

BLOCK = 64
"""Candidates compared at once; fixed, so that sums do not depend on the number of threads."""


@dataclass(frozen=True)
class Facilities:
    """Rows in the order they were chosen.

    Attributes:
        rows: int64 places, shape (k,).
        gains: What each added, float64 (k,), per covered row.
    """

    rows: np.ndarray
    gains: np.ndarray


def lazy_greedy(similarities: np.ndarray, k: int) -> Facilities:
    """Greedy choice of k rows; a gain is computed again only where it may still be the largest.

    Args:
        similarities: Not negative, shape (n, m): of each candidate to each row to cover.
        k: How many, at most n.

    Returns:
        The choice; equal gains go to the earlier row.
    """
    m = similarities.shape[1]
    covered = np.zeros(m, dtype=np.float32)
    first = similarities.sum(axis=1, dtype=np.float64) / m
    heap = [(-gain, place) for place, gain in enumerate(np.round(first, 9).tolist())]
    heapq.heapify(heap)
    rows: list[int] = []
    gains: list[float] = []
    while heap and len(rows) < k:
        _, place = heapq.heappop(heap)
        gain = _gain(similarities[place], covered)
        if heap and (-gain, place) > heap[0]:
            heapq.heappush(heap, (-gain, place))
            continue
        covered = np.maximum(covered, similarities[place])
        rows.append(place)
        gains.append(gain)
    return Facilities(np.array(rows, dtype=np.int64), np.array(gains))


def _gain(similarities: np.ndarray, covered: np.ndarray) -> float:
    added = np.maximum(similarities - covered, 0).sum(dtype=np.float64) / len(covered)
    return round(float(added), 9)


def stochastic_greedy(x: np.ndarray, cover: np.ndarray, k: int, turns: np.ndarray) -> Facilities:
    """Greedy choice where every row is looked at in a few of the k turns only.

    Args:
        x: Unit vectors of the candidates, float32, shape (n, d).
        cover: Unit vectors of the rows to cover, float32, shape (m, d). Similarity is
            max(0, cosine).
        k: How many, at most n.
        turns: Turn 0..k-1 in which a row is looked at, several a row, shape (n, c). A turn that
            finds all its rows chosen takes the first row in place that is left.

    Returns:
        The choice; equal gains go to the earlier row.
    """
    n, m = len(x), len(cover)
    turned = np.ascontiguousarray(cover.T)
    covered = np.zeros(m, dtype=np.float32)
    by_turn = np.argsort(turns.ravel(), kind="stable")
    ends = np.searchsorted(turns.ravel()[by_turn], np.arange(k + 1))
    left = np.ones(n, dtype=bool)
    rows, gains = np.empty(k, dtype=np.int64), np.empty(k)
    earliest = 0

    def best_of(seen: np.ndarray, start: int, stop: int) -> tuple[float, int]:
        added = x[seen[start:stop]] @ turned
        added -= covered
        np.maximum(added, 0, out=added)
        sums = np.round(added.sum(axis=1, dtype=np.float64) / m, 9)
        at = int(sums.argmax())
        return float(sums[at]), -int(seen[start + at])

    with pooled() as blocks:
        for turn in range(k):
            seen = np.unique(by_turn[ends[turn] : ends[turn + 1]] // turns.shape[1])
            seen = seen[left[seen]]
            while not len(seen):
                if left[earliest]:
                    seen = np.array([earliest])
                else:
                    earliest += 1
            found = blocks(len(seen), BLOCK, partial(best_of, seen))
            gain, place = max(best for _, _, best in found)
            covered = np.maximum(covered, x[-place] @ turned)
            left[-place] = False
            rows[turn], gains[turn] = -place, gain
    return Facilities(rows, gains)


def value_of(similarities: np.ndarray, rows: np.ndarray) -> float:
    """Value of a set of candidates per covered row, by the definition.

    Args:
        similarities: Shape (n, m).
        rows: Places of the candidates in the set.
    """
    if not len(rows):
        return 0.0
    return float(similarities[rows].max(axis=0).mean())
