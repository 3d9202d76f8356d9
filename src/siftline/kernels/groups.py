"""Which rows share a key: partition, then count in a table that fits the cache.

Sorting a band costs a comparison for every doubling of the rows; a pass over the keys' top bits
cuts them into ranges small enough for the nearest cache, and in a range a table of counts finds the
keys that come twice. So the time a row takes hardly grows with the rows. Rows are given back
ascending and groups numbered by their first row, so that later steps read memory in order, too.

`grouped` puts the groups of many keys together, a list for each row that is in any. Texts and
conversations are both deduplicated from these lists.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

_RANGE = 1 << 13
_MOST_RANGES = 1 << 12


@dataclass(frozen=True)
class Groups:
    """Who shares a key with whom.

    Attributes:
        rows: int64, shape (m,): the rows that do, in the order asked for.
        lists: int64, shape (m + 1,): where the groups of each start in `numbers`; within a list
            they go by key.
        numbers: int32 group numbers.
        count: How many groups there are.
        last: Number of the first group of the last key.
    """

    rows: np.ndarray
    lists: np.ndarray
    numbers: np.ndarray
    count: int
    last: int = 0


def grouped(
    key: Callable[[int], np.ndarray],
    keys: int,
    n: int,
    order: Callable[[np.ndarray], np.ndarray] | None = None,
    each: Callable[[Callable[[int], Any], list[int]], list[Any]] | None = None,
) -> Groups:
    """Finds the rows that share any of their keys.

    Args:
        key: Gives the k-th key of every row, uint64, shape (n,); see `shared`.
        keys: How many keys a row has.
        n: Rows.
        order: Takes ascending rows, int64, and gives the positions that put them in order; by
            default they stay as they are.
        each: Maps a function over a list, in threads; by default one after another.
    """
    numbered = list(range(keys))
    found = each(lambda k: shared(key(k)), numbered) if each else [shared(key(k)) for k in numbered]
    counts = np.zeros(n, np.int32)
    for rows, _, _ in found:
        counts[rows] += 1
    candidates = np.flatnonzero(counts)
    if order is not None:
        candidates = candidates[order(candidates)]
    place = np.empty(n, np.int32)
    place[candidates] = np.arange(len(candidates), dtype=np.int32)
    lists = np.zeros(len(candidates) + 1, np.int64)
    np.cumsum(counts[candidates], out=lists[1:])
    numbers = np.empty(lists[-1], np.int32)
    ends, base, last = lists[:-1].copy(), 0, 0
    for k, (rows, groups, count) in enumerate(found):
        memberships(place[rows], groups, base, ends, numbers)
        last, base = base, base + count
        found[k] = (rows[:0], groups[:0], 0)  # the memory is wanted for the next
    return Groups(candidates.astype(np.int64), lists, numbers, base, last)


def shared(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The rows whose key another row has.

    Args:
        keys: uint64, shape (n,); 0 is shared with nobody.

    Returns:
        int32 rows, ascending; the int32 numbers of their groups, in the order of their first rows;
        and how many groups there are.
    """
    assert len(keys) < 2**31, "rows are counted in 32 bits"
    bits = 0
    while (len(keys) >> bits) > _RANGE and (1 << bits) < _MOST_RANGES:
        bits += 1
    rows, groups, found = _shared(np.ascontiguousarray(keys), bits)
    return rows, groups, int(found)


def shared_reference(keys: list[int]) -> set[frozenset[int]]:
    """The groups of `shared` as sets of rows."""
    groups: dict[int, set[int]] = {}
    for row, key in enumerate(keys):
        if key:
            groups.setdefault(key, set()).add(row)
    return {frozenset(rows) for rows in groups.values() if len(rows) > 1}


def among(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Whether each of many keys is one of some.

    Args:
        keys: uint64, shape (n,).
        wanted: uint64; 0 is not looked for.

    Returns:
        bool, shape (n,).
    """
    size = 16
    while size < 4 * len(wanted):
        size *= 2
    table = np.zeros(size, np.uint64)
    out = np.empty(len(keys), np.bool_)
    _among(np.ascontiguousarray(keys), np.ascontiguousarray(wanted), table, out)
    return out


@njit(cache=True, nogil=True)
def _among(keys: np.ndarray, wanted: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    last = len(table) - 1
    for key in wanted:
        slot = np.int64(key & np.uint64(last))
        while table[slot] != 0 and table[slot] != key:
            slot = (slot + 1) & last
        table[slot] = key
    for i in range(len(keys)):
        key = keys[i]
        slot = np.int64(key & np.uint64(last))
        while table[slot] != 0 and table[slot] != key:
            slot = (slot + 1) & last
        out[i] = key != 0 and table[slot] == key


@njit(cache=True, nogil=True)
def memberships(
    rows: np.ndarray, groups: np.ndarray, base: int, ends: np.ndarray, out: np.ndarray
) -> None:
    """Appends the groups of one band to each row's list.

    Args:
        rows: int32, shape (m,), as of `shared`.
        groups: int32, shape (m,).
        base: Number of the band's first group.
        ends: int64, shape (n,): where each row's list ends; moved on.
        out: int32 lists.
    """
    for k in range(len(rows)):
        row = rows[k]
        out[ends[row]] = base + groups[k]
        ends[row] += 1


@njit(cache=True, nogil=True)
def _shared(keys: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, int]:
    parted, order, starts = _partition(keys, bits)
    largest = 1
    for r in range(1 << bits):
        largest = max(largest, starts[r + 1] - starts[r])
    size = 2
    while size < 2 * largest:
        size *= 2
    held = np.zeros(size, np.uint64)
    count = np.zeros(size, np.int32)
    place = np.empty(largest, np.int32)
    group_of = np.zeros(len(keys), np.int32)  # from 1
    found = 0
    for r in range(1 << bits):
        first, last = starts[r], starts[r + 1]
        # The table is as large as this range asks for, so that clearing it costs no more.
        span = 2
        while span < 2 * (last - first):
            span *= 2
        held[:span] = 0
        count[:span] = 0
        for p in range(first, last):
            key = parted[p]
            slot = np.int64(key & np.uint64(span - 1))
            while held[slot] != 0 and held[slot] != key:
                slot = (slot + 1) & (span - 1)
            held[slot] = key
            count[slot] += 1
            place[p - first] = slot
        for p in range(first, last):
            slot = place[p - first]
            if count[slot] > 1:
                found += 1
                count[slot] = -found  # from now on the group's number, below zero
            if count[slot] < 0:
                group_of[order[p]] = -count[slot]
    rows, groups = _in_order(group_of, found)
    return rows, groups, found


@njit(cache=True, nogil=True)
def _in_order(group_of: np.ndarray, found: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that have a group, and these numbered from 0 by their first rows."""
    size = 0
    for group in group_of:
        size += group > 0
    rows, groups = np.empty(size, np.int32), np.empty(size, np.int32)
    number = np.full(found + 1, -1, np.int32)
    written, known = 0, 0
    for i in range(len(group_of)):
        group = group_of[i]
        if group > 0:
            if number[group] < 0:
                number[group] = known
                known += 1
            rows[written] = i
            groups[written] = number[group]
            written += 1
    return rows, groups


@njit(cache=True, nogil=True)
def _partition(keys: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The keys that are not 0 ordered by their top bits, their rows, and where ranges start."""
    starts = np.zeros((1 << bits) + 2, np.int64)
    for key in keys:
        if key != 0:
            starts[_range(key, bits) + 2] += 1
    for r in range(1 << bits):
        starts[r + 2] += starts[r + 1]
    parted = np.empty(starts[-1], np.uint64)
    order = np.empty(starts[-1], np.int32)
    for i in range(len(keys)):
        key = keys[i]
        if key != 0:
            r = _range(key, bits)
            p = starts[r + 1]
            parted[p] = key
            order[p] = i
            starts[r + 1] = p + 1
    return parted, order, starts[:-1]


@njit(cache=True, nogil=True)
def _range(key: np.uint64, bits: int) -> np.int64:
    return np.int64(key >> np.uint64(64 - bits)) if bits else np.int64(0)
