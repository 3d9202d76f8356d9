"""The loops of `keepers`: they allocate nothing, so that they can be kept compiled (`machine`)."""

import numpy as np
from numba import njit

from siftline.kernels.sets.jaccard import Chains, append, required_overlap
from siftline.kernels.sets.keepers import KEPT, NEW, Candidates, Decisions


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
def keep_first(
    rows: Candidates,
    head: np.ndarray,
    tail: np.ndarray,
    after: np.ndarray,
    owner: np.ndarray,
    seen: np.ndarray,
    threshold: float,
    max_pairs: int,
    before: Decisions,
    now: Decisions,
) -> int:
    """Writes the decisions of `keepers.keep_first` to `now`; the pairs compared.

    The first four are chains (`jaccard.Chains`), empty; `seen`, all -1, is the last row that each
    was looked at for.
    """
    m = len(rows.sizes)
    chains = Chains(head, tail, after, owner)
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
def drop_all(
    rows: Candidates,
    members: np.ndarray,
    starts: np.ndarray,
    seen: np.ndarray,
    threshold: float,
    max_pairs: int,
    now: Decisions,
) -> int:
    """Writes the decisions of `keepers.drop_all` to `now`; the pairs compared.

    `members` is room for the rows of each group, `starts` zeros, two more than there are groups;
    `seen` as in `keep_first`.
    """
    m = len(rows.sizes)
    _members(rows, members, starts)
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
def _members(rows: Candidates, members: np.ndarray, starts: np.ndarray) -> None:
    """Writes the rows of each group in keep order, and where each group starts."""
    for group in rows.groups:
        starts[group + 2] += 1
    for group in range(2, len(starts)):
        starts[group] += starts[group - 1]
    for i in range(len(rows.sizes)):
        for c in range(rows.lists[i], rows.lists[i + 1]):
            group = rows.groups[c]
            members[starts[group + 1]] = i
            starts[group + 1] += 1
