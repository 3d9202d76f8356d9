"""Greedy removal of near duplicates: each row is held against kept rows only, in keep order.

Pairing everything a band brings together and cutting the graph afterwards has two faults: a group
of m copies costs m^2 pairs, and its components join rows that are not similar to each other. Here a
band holds the kept rows that fell into it, in keep order, and a removed row is never added. So m
copies cost m comparisons, a row goes only for a kept row it was verified similar to (the first in
keep order), and nothing but the result is stored. What can still grow is the number of mutually
dissimilar rows in one band; `max_pairs` bounds it.

As `keepers`, for rows of two texts that may contradict each other.

Rows of two texts, a prompt and a response: their band keys, and what of their sets is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numba import njit

from siftline.kernels.sets.jaccard import Chains, append, jaccard_reference, no_chains, similar
from siftline.kernels.sets.lsh import Banding
from siftline.kernels.sets.shingles import Sets
from siftline.kernels.sets.spill import Stored
from siftline.kernels.text.texts import ALONE

GAP, BLOCK = 1 << 12, 1 << 22
"""Of hashes: a smaller gap is read rather than skipped, and no more are read at once."""
_G = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


def pair_keys(
    slots: np.ndarray,
    texts: np.ndarray,
    tiny: np.ndarray,
    guard: np.ndarray,
    banding: Banding,
) -> np.ndarray:
    """One key a band of rows of two texts: `lsh.band_keys` of the slots that each text gives.

    Args:
        slots: uint32 signatures of the texts, shape (t, at least banding.slots).
        texts: int64, shape (n, 2): prompt and response of each row.
        tiny: bool, shape (t,): texts that give no slots, as nothing but the same resembles them.
        guard: uint64, shape (n,); rows whose guards differ never share a key.
        banding: How to cut them.

    Returns:
        uint64, shape (bands, n); none is `rows.ALONE`.
    """
    out = np.empty((banding.bands, len(texts)), np.uint64)
    _pair_keys(slots, texts, tiny, guard, banding.rows, out)
    return out


def copy_sets(
    stored: Stored, offsets: np.ndarray, wanted: np.ndarray, values: np.ndarray, to: np.ndarray
) -> None:
    """Copies some sets, reading what lies together at once.

    Args:
        stored: Values of all sets, uint32.
        offsets: int64, shape (t + 1,): where each set starts in them (`shingles.Sets`).
        wanted: Ascending positions, int64, shape (m,).
        values: uint32, where they go.
        to: int64, shape (m,): where each starts in it.
    """
    if not len(wanted):
        return
    begins, ends = offsets[wanted], offsets[wanted + 1]
    apart = (begins[1:] - ends[:-1] > GAP) | (begins[1:] // BLOCK != begins[:-1] // BLOCK)
    cuts = np.concatenate([[0], np.flatnonzero(apart) + 1, [len(wanted)]]).tolist()
    for first, last in pairwise(cuts):
        at = begins[first]
        part = stored[int(at) : int(ends[last - 1])]
        _copy(part, begins[first:last] - at, ends[first:last] - at, values, to[first:last])


@njit(cache=True, nogil=True)
def told_apart(
    lists: np.ndarray,
    stops: np.ndarray,
    numbers: np.ndarray,
    texts: np.ndarray,
    n_groups: int,
    n_texts: int,
) -> np.ndarray:
    """The texts that a comparison may read: in a group of one text nothing is left to compare.

    Args:
        lists: int64, shape (m,): where the groups of each row start in `numbers`.
        stops: int64, shape (m,): where they end.
        numbers: int32 group numbers.
        texts: int32, shape (m, 2).
        n_groups: How many groups there are.
        n_texts: How many texts.

    Returns:
        bool, shape (n_texts,).
    """
    out = np.zeros(n_texts, np.bool_)
    for side in range(2):
        first = np.full(n_groups, -1, np.int32)
        for i in range(len(stops)):
            text = texts[i, side]
            for c in range(lists[i], stops[i]):
                if first[numbers[c]] == -1:
                    first[numbers[c]] = text
                elif first[numbers[c]] != text:
                    first[numbers[c]] = -2
        for i in range(len(stops)):
            for c in range(lists[i], stops[i]):
                if first[numbers[c]] == -2:
                    out[texts[i, side]] = True
    return out


@njit(cache=True, nogil=True)
def _mix(h: np.uint64) -> np.uint64:
    h = h * _G
    return h ^ (h >> _SHIFT)


@njit(cache=True, nogil=True)
def _pair_keys(
    slots: np.ndarray,
    texts: np.ndarray,
    tiny: np.ndarray,
    guard: np.ndarray,
    rows: int,
    out: np.ndarray,
) -> None:
    half = rows // 2
    for i in range(len(texts)):
        prompt, response = texts[i]
        # Of a text that gives none, the other gives all; of two, the prompt.
        split = rows if tiny[response] else (0 if tiny[prompt] else half)
        for band in range(len(out)):
            h = _mix(np.uint64(guard[i]) ^ np.uint64(band + 1))
            at = band * rows
            for slot in range(rows):
                text = prompt if slot < split else response
                h = _mix(h ^ np.uint64(slots[text, at + slot]))
            out[band, i] = max(h, ALONE + np.uint64(1))


@njit(cache=True, nogil=True)
def _copy(
    part: np.ndarray, begins: np.ndarray, ends: np.ndarray, values: np.ndarray, to: np.ndarray
) -> None:
    for k in range(len(begins)):
        values[to[k] : to[k] + ends[k] - begins[k]] = part[begins[k] : ends[k]]


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
