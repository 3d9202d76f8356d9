"""Who stays: rows in keep order, each held against the kept rows it shares a band with.

A row goes only for a kept row that it was verified similar to, the first in keep order; a removed
row removes nobody. As in `greedy`, a band group is a chain of its kept rows, so m copies cost m
comparisons and not m^2. What is new here is memory of an earlier decision: where rows arrive later,
an old row is held only against what changed since (new rows, and old ones kept now but not then),
which gives the decisions of doing everything at once.

`drop_all` is the other policy: every row that resembles any other goes, the first as well.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from siftline.kernels.chains import Chains, append, no_chains
from siftline.kernels.jaccard import jaccard_reference, required_overlap

NEW = -2
"""Earlier decision of a row there was none for."""
KEPT = -1


class Candidates(NamedTuple):
    """m rows in keep order, each of which shares a band with another.

    Attributes:
        lists: int64, shape (m + 1,): row i is in groups[lists[i]:lists[i + 1]].
        groups: int32 group numbers.
        hashes: uint64, shape (m,): of the texts' bytes; stands in for an empty set.
        values: uint32 shingle hashes, ascending and distinct within a row.
        starts: int64, shape (m,): where a row's hashes start.
        sizes: int32, shape (m,): how many it has.
    """

    lists: np.ndarray
    groups: np.ndarray
    hashes: np.ndarray
    values: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray


class Decisions(NamedTuple):
    """What became of m rows; arrays of shape (m,).

    Attributes:
        matched: int32 position of the kept row that row i lost to, KEPT where it is kept.
        value: float64 similarity to that row, 0 where it is kept.
    """

    matched: np.ndarray
    value: np.ndarray


def keep_first(
    rows: Candidates, n_groups: int, threshold: float, max_pairs: int, before: Decisions
) -> tuple[Decisions, int]:
    """Decides row by row in keep order.

    Args:
        rows: m rows in keep order.
        n_groups: Number of groups.
        threshold: Jaccard similarity in (0, 1].
        max_pairs: Most pairs to compare.
        before: Earlier decisions on these rows, NEW in `matched` where there was none.

    Returns:
        The decisions, and how many pairs were compared.

    Raises:
        ValueError: if more than `max_pairs` comparisons are needed.
    """
    m = _checked(rows, n_groups)
    assert before.matched.max(initial=-1) < m, "earlier matches must point into the rows"
    now = Decisions(np.full(m, KEPT, np.int32), np.zeros(m, np.float64))
    pairs = _keep_first(rows, n_groups, threshold, max_pairs, before, now)
    return now, _within(pairs, max_pairs, threshold)


def drop_all(
    rows: Candidates, n_groups: int, threshold: float, max_pairs: int
) -> tuple[Decisions, int]:
    """Matches every row with the first other row that it is similar to, removed or not.

    Raises:
        ValueError: if more than `max_pairs` comparisons are needed.
    """
    m = _checked(rows, n_groups)
    now = Decisions(np.full(m, KEPT, np.int32), np.zeros(m, np.float64))
    pairs = _drop_all(rows, n_groups, threshold, max_pairs, now)
    return now, _within(pairs, max_pairs, threshold)


def keep_first_reference(sets: list[set[int]], threshold: float) -> list[int]:
    """`Decisions.matched` of rows in keep order by comparing each with every kept row."""
    kept: list[int] = []
    matched = []
    for i, mine in enumerate(sets):
        near = [j for j in kept if jaccard_reference(mine, sets[j]) >= threshold]
        matched.append(near[0] if near else KEPT)
        if not near:
            kept.append(i)
    return matched


def drop_all_reference(sets: list[set[int]], threshold: float) -> list[int]:
    """`Decisions.matched` of `drop_all` by comparing all with all."""
    return [
        next(
            (
                j
                for j, other in enumerate(sets)
                if j != i and jaccard_reference(mine, other) >= threshold
            ),
            KEPT,
        )
        for i, mine in enumerate(sets)
    ]


def _checked(rows: Candidates, n_groups: int) -> int:
    # Compiled code does not check bounds.
    m = len(rows.sizes)
    assert len(rows.lists) == m + 1
    assert len(rows.hashes) == len(rows.starts) == m
    assert rows.groups.max(initial=-1) < n_groups, "groups must be numbered below n_groups"
    assert m == 0 or int((rows.starts + rows.sizes).max()) <= len(rows.values)
    return m


def _within(pairs: int, max_pairs: int, threshold: float) -> int:
    if pairs > max_pairs:
        raise ValueError(
            f"more than {max_pairs:,} candidate pairs: many rows resemble each other below the "
            f"threshold {threshold}; raise the threshold or deduplicate the files by source"
        )
    return int(pairs)


@njit(cache=True, nogil=True)
def similarity(rows: Candidates, i: int, j: int, threshold: float) -> float:
    """Jaccard similarity of rows i and j where it is at least `threshold`, else -1."""
    a, b = np.int64(rows.sizes[i]), np.int64(rows.sizes[j])
    if a == 0 or b == 0:
        return 1.0 if a == b and rows.hashes[i] == rows.hashes[j] else -1.0
    need = required_overlap(a, b, threshold)
    if need > min(a, b):
        return -1.0
    p, q = rows.starts[i], rows.starts[j]
    p_stop, q_stop = p + a, q + b
    same = 0
    while p < p_stop and q < q_stop:
        # Looked at now and then: a test a step would cost more than the steps it saves.
        if same + min(p_stop - p, q_stop - q) < need:
            return -1.0
        for _ in range(32):
            if p == p_stop or q == q_stop:
                break
            x, y = rows.values[p], rows.values[q]
            same += x == y
            p += x <= y
            q += y <= x
    return same / (a + b - same) if same >= need else -1.0


@njit(cache=True, nogil=True)
def _keep_first(
    rows: Candidates,
    n_groups: int,
    threshold: float,
    max_pairs: int,
    before: Decisions,
    now: Decisions,
) -> int:
    m, links = len(rows.sizes), len(rows.groups)
    chains = no_chains(n_groups, links)
    seen = np.full(m, -1, np.int32)  # the last row that row j was looked at for
    pairs = 0
    for i in range(m):
        left = max_pairs - pairs
        best, value, compared = _nearest(rows, chains, seen, threshold, left, before, now, i)
        pairs += compared
        if pairs > max_pairs:
            return pairs
        if best < m:
            now.matched[i] = best
            now.value[i] = value
            continue
        for c in range(rows.lists[i], rows.lists[i + 1]):
            append(chains, rows.groups[c], c, i)
    return pairs


@njit(cache=True, nogil=True)
def _nearest(
    rows: Candidates,
    chains: Chains,
    seen: np.ndarray,
    threshold: float,
    max_pairs: int,
    before: Decisions,
    now: Decisions,
    i: int,
) -> tuple[int, float, int]:
    """The first kept row similar to row i (m if there is none), how similar, and pairs compared."""
    best, value, pairs = len(rows.sizes), 0.0, 0
    old = before.matched[i]
    if old >= 0 and now.matched[old] == KEPT:
        best, value = old, before.value[i]  # only what changed before it can take its place
    for c in range(rows.lists[i], rows.lists[i + 1]):
        link = chains.head[rows.groups[c]]
        while link >= 0 and chains.owner[link] < best:
            j = chains.owner[link]
            link = chains.after[link]
            if seen[j] == i or _dissimilar(before, i, j):
                continue
            seen[j] = i
            pairs += 1
            if pairs > max_pairs:
                return best, value, pairs
            found = similarity(rows, i, j, threshold)
            if found >= 0.0:
                best, value = j, found
    return best, value, pairs


@njit(cache=True, nogil=True)
def _dissimilar(before: Decisions, i: int, j: int) -> bool:
    """Whether the earlier decision on row i found it dissimilar to row j, which is kept now.

    Row i was then compared with the kept rows before its match, or where it was kept with all.
    """
    old = before.matched[i]
    return old != NEW and before.matched[j] == KEPT and (old == KEPT or j < old)


@njit(cache=True, nogil=True)
def _drop_all(
    rows: Candidates, n_groups: int, threshold: float, max_pairs: int, now: Decisions
) -> int:
    m = len(rows.sizes)
    members, starts = _members(rows, n_groups)
    seen = np.full(m, -1, np.int32)
    pairs = 0
    for i in range(m):
        best = m
        for c in range(rows.lists[i], rows.lists[i + 1]):
            group = rows.groups[c]
            for p in range(starts[group], starts[group + 1]):
                j = members[p]
                if j >= best:
                    break
                if j == i or seen[j] == i:
                    continue
                seen[j] = i
                pairs += 1
                if pairs > max_pairs:
                    return pairs
                found = similarity(rows, i, j, threshold)
                if found >= 0.0:
                    best = j
                    now.value[i] = found
        if best < m:
            now.matched[i] = best
    return pairs


@njit(cache=True, nogil=True)
def _members(rows: Candidates, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of each group in keep order, and where each group starts."""
    starts = np.zeros(n_groups + 1, np.int64)
    for group in rows.groups:
        starts[group + 1] += 1
    for group in range(n_groups):
        starts[group + 1] += starts[group]
    members = np.empty(len(rows.groups), np.int32)
    ends = starts[:-1].copy()
    for i in range(len(rows.sizes)):
        for c in range(rows.lists[i], rows.lists[i + 1]):
            members[ends[rows.groups[c]]] = i
            ends[rows.groups[c]] += 1
    return members, starts
