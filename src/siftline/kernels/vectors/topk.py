"""The best rows per query without all pairs, and the round-robin that takes from them.

Scores come in blocks of rows. A score and the place of its row are packed into one 64-bit key whose
order is "higher score first, then the earlier row", so ties need no second look and the lists are
the same whatever the blocks.

How far each vector's k-th nearest neighbour is, over all pairs in blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from siftline.kernels.vectors.blocks import cosine_blocks, over_blocks, unit

PENDING = 1 << 18
"""Keys of all queries together that are collected before they are merged into the lists."""


@dataclass(frozen=True)
class Lists:
    """The best rows of every query, best first.

    Attributes:
        rows: int64 places, shape (q, r).
        scores: float32, shape (q, r).
        whole: True when the lists hold every row.
    """

    rows: np.ndarray
    scores: np.ndarray
    whole: bool


def top_lists(n: int, q: int, r: int, rows: int, score: Callable[[int, int], np.ndarray]) -> Lists:
    """Finds the r best of n rows for each of q queries.

    Memory: 24 bytes for each of up to 2 x r x q + 262,144 keys while they are merged, and blocks of
    about 2 million scores, 60 MiB a thread.

    Args:
        n: Rows in all, below 2^32.
        q: Queries.
        r: Length of a list.
        rows: Rows of a block.
        score: `score(start, stop)` gives finite float32 scores, shape (stop - start, q); it is
            called on several threads.

    Returns:
        The lists; equal scores are in the order of rows.
    """
    assert n < 1 << 32, n
    r = min(r, n)

    def keyed(start: int, stop: int) -> np.ndarray:
        return _best(_keys(score(start, stop), start), r)

    pending: list[np.ndarray] = []
    for _, _, keys in over_blocks(n, rows, keyed):
        pending.append(keys)
        if sum(part.size for part in pending) > 2 * r * q + PENDING:
            pending = [_best(np.concatenate(pending, axis=1), r)]
    if not pending:
        empty = np.zeros((q, 0), dtype=np.int64)
        return Lists(empty, empty.astype(np.float32), True)
    keys = np.sort(_best(np.concatenate(pending, axis=1), r), axis=1)[:, ::-1]
    return Lists(*_unpacked(keys), whole=r == n)


def _keys(scores: np.ndarray, start: int) -> np.ndarray:
    """Sortable keys, uint64, shape (q, b)."""
    bits = (np.ascontiguousarray(scores.T, dtype=np.float32) + np.float32(0)).view(np.uint32)
    # Floats sort as integers once the sign is folded in; adding 0 made -0.0 equal to 0.0.
    negative = bits >> np.uint32(31) == 1
    ordered = np.where(negative, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    places = np.uint64((1 << 32) - 1) - np.arange(start, start + len(scores), dtype=np.uint64)
    return (ordered << np.uint64(32)) | places


def _unpacked(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ordered = (keys >> np.uint64(32)).astype(np.uint32)
    positive = ordered >> np.uint32(31) == 1
    bits = np.where(positive, ordered & np.uint32((1 << 31) - 1), ~ordered).astype(np.uint32)
    places = (1 << 32) - 1 - (keys & np.uint64((1 << 32) - 1)).astype(np.int64)
    return places, bits.view(np.float32)


def _best(keys: np.ndarray, r: int) -> np.ndarray:
    """The r largest keys of each line, in no order."""
    if keys.shape[1] <= r:
        return keys
    cut = keys.shape[1] - r
    return np.ascontiguousarray(np.partition(keys, cut, axis=1)[:, cut:])


@dataclass(frozen=True)
class Picks:
    """Rows in the order they were taken.

    Attributes:
        rows: int64 places, shape (k,).
        queries: Query that took each, shape (k,).
        scores: float32, shape (k,).
        starved: Queries whose list ended before they could take; empty when the picks are final.
    """

    rows: np.ndarray
    queries: np.ndarray
    scores: np.ndarray
    starved: bool


def round_robin(lists: Lists, k: int) -> Picks:
    """Lets queries take, in turn, the best row on their list that nobody has (RDS+, algorithm 1).

    Args:
        lists: From `top_lists`.
        k: Rows to take.

    Returns:
        Up to k picks: fewer where every row is taken, or with `starved` where a list was too short
        (then ask again with longer lists; the picks so far would be the same).
    """
    q, r = lists.rows.shape
    at = [0] * q
    taken: set[int] = set()
    places = [line.tolist() for line in lists.rows]
    rows: list[int] = []
    queries: list[int] = []
    scores: list[float] = []
    while len(rows) < k:
        for query in range(q):
            own, i = places[query], at[query]
            while i < r and own[i] in taken:
                i += 1
            at[query] = i + 1
            if i >= r:
                return _picks(rows, queries, scores, starved=not lists.whole)
            taken.add(own[i])
            rows.append(own[i])
            queries.append(query)
            scores.append(lists.scores[query, i])
            if len(rows) == k:
                break
        if not q:
            break
    return _picks(rows, queries, scores, starved=False)


def _picks(rows: list[int], queries: list[int], scores: list[float], *, starved: bool) -> Picks:
    return Picks(
        np.array(rows, dtype=np.int64),
        np.array(queries, dtype=np.int64),
        np.array(scores, dtype=np.float32),
        starved,
    )


def round_robin_reference(scores: np.ndarray, k: int) -> list[int]:
    """The same over all pairs, by the definition; for small inputs.

    Args:
        scores: Shape (q, n).
        k: Rows to take.

    Returns:
        Places in the order taken.
    """
    left = scores.astype(np.float64).copy()
    order: list[int] = []
    while len(order) < min(k, scores.shape[1]):
        for query in range(len(left)):
            if len(order) == min(k, scores.shape[1]):
                break
            best = int(left[query].argmax())
            order.append(best)
            left[:, best] = -np.inf
    return order


QUERIES = 2048
"""Vectors whose neighbours are looked for at once."""


def kth_distances(
    x: np.ndarray, k: int, progress: Callable[[int], None] = lambda rows: None
) -> np.ndarray:
    """Distances of vectors, scaled to unit length, to their k-th nearest neighbour.

    Neighbours are ranked by cosine. A vector is no neighbour of itself, but an equal one is, at
    distance 0. Time: all pairs. Memory: 4 bytes a value beside `x`, and blocks.

    Args:
        x: Vectors, shape (n, d), any float type.
        k: Which neighbour, from 1.
        progress: Called with the number of vectors done.

    Returns:
        Euclidean distances, 0 to 2, float64, shape (n,): sqrt(2 - 2 x cosine). A vector of zeros,
        whose cosines are 0, is 1 away from all that are not.

    Raises:
        ValueError: if there are not more than k vectors.
    """
    if not 1 <= k < len(x):
        raise ValueError(
            f"the neighbour asked for is {k}, and there are {len(x)} vectors: give 1 to "
            f"{len(x) - 1}, or more rows"
        )
    vectors = unit(x)
    found = np.empty(len(x))
    for start in range(0, len(x), QUERIES):
        own = np.arange(start, min(start + QUERIES, len(x)))
        score, block = cosine_blocks(x, x[own])
        rows = top_lists(len(x), len(own), k + 1, block, score).rows
        # Among many equal vectors a row may be missing from its own list: then the last one goes.
        others = rows != own[:, None]
        others[others.all(axis=1), -1] = False
        kth = rows[others].reshape(len(own), k)[:, -1]
        apart = vectors[own].astype(np.float64) - vectors[kth]
        found[own] = np.sqrt(np.einsum("ij,ij->i", apart, apart))
        progress(len(own))
    return found
