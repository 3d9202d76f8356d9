"""Greedy removal of near duplicates: each row is held against kept rows only, in keep order.

Pairing everything a band brings together and cutting the graph afterwards has two faults: a group
of m copies costs m^2 pairs, and its components join rows that are not similar to each other. Here a
band holds the kept rows that fell into it, in keep order, and a removed row is never added. So m
copies cost m comparisons, a row goes only for a kept row it was verified similar to (the first in
keep order), and nothing but the result is stored. What can still grow is the number of mutually
dissimilar rows in one band; `max_pairs` bounds it.

As `keepers`, for rows of two texts that may contradict each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit

from siftline.kernels.sets.chains import Chains, append, no_chains
from siftline.kernels.sets.jaccard import jaccard_reference, similar
from siftline.kernels.sets.shingles import Sets


class Rows(NamedTuple):
    """n rows in keep order; arrays of shape (n,) unless stated.

    Attributes:
        starts: int64: row i is in groups[starts[i]:stops[i]].
        stops: int64.
        groups: int32 band groups, a list for each row.
        identity: int32 group, below n, of rows with equal texts; -1 takes no part.
        texts: int32, shape (n, 2): positions of the two sets of a row, both held to the threshold.
        guard: uint64; rows whose guards differ are not compared.
        label: int64; rows whose labels differ contradict each other; -1 has none.
        strict: bool; such a row is only removed for one with the same label.
    """

    starts: np.ndarray
    stops: np.ndarray
    groups: np.ndarray
    identity: np.ndarray
    texts: np.ndarray
    guard: np.ndarray
    label: np.ndarray
    strict: np.ndarray


@dataclass(frozen=True)
class Removals:
    """What `remove_similar` decided; arrays of shape (n,).

    Attributes:
        matched: int32 position of the kept row that row i lost to, -1 where it is kept.
        value: float64 smaller of the two similarities, 0 where it is kept.
        identical: bool, True where the loss was to a row of the same identity.
        pairs: Pairs compared.
        verified: Pairs found similar.
    """

    matched: np.ndarray
    value: np.ndarray
    identical: np.ndarray
    pairs: int
    verified: int


def remove_similar(
    rows: Rows, sets: Sets, n_groups: int, threshold: float, max_pairs: int
) -> Removals:
    """Removes each row that equals or resembles a row kept before it.

    Args:
        rows: n rows in keep order.
        sets: The sets that `rows.texts` points into; those of texts that are alone in their groups
            may be empty.
        n_groups: Number of groups.
        threshold: Jaccard similarity both texts must reach.
        max_pairs: Most pairs to compare.

    Raises:
        ValueError: if more than `max_pairs` comparisons are needed.
    """
    n = len(rows.identity)
    # Compiled code does not check bounds.
    assert rows.identity.max(initial=-1) < n, "identities must be numbered below n"
    assert rows.texts.max(initial=-1) < len(sets), "texts must point into the sets"
    assert len(rows.starts) == len(rows.stops) == n, f"{len(rows.stops)} lists for {n} rows"
    assert rows.stops.max(initial=0) <= len(rows.groups), "lists must lie in the groups"
    assert rows.groups.max(initial=-1) < n_groups, "groups must be numbered below n_groups"
    state = _State.empty(n)
    _remove_similar(rows, sets.values, sets.offsets, n_groups, threshold, max_pairs, state)
    pairs, verified = (int(count) for count in state.counts)
    if pairs > max_pairs:
        raise ValueError(
            f"more than {max_pairs:,} candidate pairs: many rows resemble each other below the "
            f"threshold {threshold}; raise the threshold or split the pool by source"
        )
    return Removals(state.matched, state.value, state.identical, pairs, verified)


def remove_similar_reference(rows: Rows, sets: Sequence[set[int]], threshold: float) -> list[int]:
    """`Removals.matched` by comparing every row with every kept row, on Python sets."""
    kept: list[int] = []
    matched = []
    for i in range(len(rows.identity)):
        allowed = [j for j in kept if _agrees_reference(rows, i, j)]
        same = [j for j in allowed if 0 <= rows.identity[i] == rows.identity[j]]
        near = [
            j
            for j in allowed
            if rows.guard[i] == rows.guard[j]
            and all(
                jaccard_reference(sets[a], sets[b]) >= threshold
                for a, b in zip(rows.texts[i], rows.texts[j], strict=True)
            )
        ]
        matched.append((same or near or [-1])[0])
        if matched[-1] < 0:
            kept.append(i)
    return matched


def _agrees_reference(rows: Rows, i: int, j: int) -> bool:
    if rows.label[i] == rows.label[j] or rows.label[i] < 0:
        return True
    return bool(rows.label[j] < 0 and not rows.strict[i])


class _State(NamedTuple):
    seen: np.ndarray  # the last row that row j was compared with
    matched: np.ndarray
    value: np.ndarray
    identical: np.ndarray
    counts: np.ndarray  # pairs compared, pairs found similar

    @classmethod
    def empty(cls, n: int) -> "_State":
        seen, matched = np.full((2, n), -1, np.int32)
        value, identical = np.zeros(n, np.float64), np.zeros(n, np.bool_)
        return cls(seen, matched, value, identical, np.zeros(2, np.int64))


@njit(cache=True)
def _agrees(rows: Rows, i: int, j: int) -> bool:
    if rows.label[i] == rows.label[j] or rows.label[i] < 0:
        return True
    return rows.label[j] < 0 and not rows.strict[i]


@njit(cache=True)
def _twin(rows: Rows, twins: Chains, i: int) -> int:
    """The first kept row equal to row i that it does not contradict, or -1."""
    j = twins.head[rows.identity[i]]  # a link is its row
    while j >= 0 and not _agrees(rows, i, j):
        j = twins.after[j]
    return j


@njit(cache=True)
def _compare(
    rows: Rows, values: np.ndarray, offsets: np.ndarray, i: int, j: int, threshold: float
) -> float:
    if rows.guard[i] != rows.guard[j] or not _agrees(rows, i, j):
        return -1.0
    # The second text first: alternatives to one prompt are the commonest false candidates.
    second = similar(values, offsets, rows.texts[i, 1], rows.texts[j, 1], threshold)
    if second < 0.0:
        return -1.0
    return min(second, similar(values, offsets, rows.texts[i, 0], rows.texts[j, 0], threshold))


@njit(cache=True)
def _nearest(
    rows: Rows,
    values: np.ndarray,
    offsets: np.ndarray,
    chains: Chains,
    threshold: float,
    state: _State,
    i: int,
) -> int:
    """The first kept row similar to row i, or -1; notes the similarity and the counts."""
    best = len(rows.guard)
    for c in range(rows.starts[i], rows.stops[i]):
        link = chains.head[rows.groups[c]]
        while link >= 0 and chains.owner[link] < best:
            j = chains.owner[link]
            link = chains.after[link]
            if state.seen[j] == i:
                continue
            state.seen[j] = i
            state.counts[0] += 1
            found = _compare(rows, values, offsets, i, j, threshold)
            if found >= 0.0:
                state.counts[1] += 1
                best, state.value[i] = j, found
    return best if best < len(rows.guard) else -1


@njit(cache=True)
def _remove_similar(
    rows: Rows,
    values: np.ndarray,
    offsets: np.ndarray,
    n_groups: int,
    threshold: float,
    max_pairs: int,
    state: _State,
) -> None:
    n = len(rows.identity)
    chains, twins = no_chains(n_groups, len(rows.groups)), no_chains(n, n)
    for i in range(n):
        if rows.identity[i] >= 0:
            state.matched[i] = _twin(rows, twins, i)
            if state.matched[i] >= 0:
                state.value[i], state.identical[i] = 1.0, True
                continue
        state.matched[i] = _nearest(rows, values, offsets, chains, threshold, state, i)
        if state.counts[0] > max_pairs:
            return
        if state.matched[i] >= 0:
            continue
        for c in range(rows.starts[i], rows.stops[i]):
            append(chains, rows.groups[c], c, i)
        if rows.identity[i] >= 0:
            append(twins, rows.identity[i], i, i)
