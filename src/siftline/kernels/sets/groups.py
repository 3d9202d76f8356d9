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

from siftline.kernels.machine import Kernel

_RANGE = 1 << 13
_MOST_RANGES = 1 << 12
_among = Kernel("siftline.kernels.sets.group_loops", "among")
_shared = Kernel("siftline.kernels.sets.group_loops", "shared")


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
        mine = place[rows]  # distinct, so that no list grows twice
        numbers[ends[mine]] = base + groups
        ends[mine] += 1
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
    n = len(keys)
    size = 2
    while size < 2 * n:
        size *= 2
    # Room for the worst case; what is not needed is never touched, and costs nothing.
    parted, held = np.empty(n, np.uint64), np.empty(size, np.uint64)
    order, place, group_of = (np.empty(n, np.int32) for _ in range(3))
    starts = np.zeros((1 << bits) + 2, np.int64)
    count = np.empty(size, np.int32)
    rows, groups, sizes = np.empty(n, np.int32), np.empty(n, np.int32), np.zeros(2, np.int64)
    keys = np.ascontiguousarray(keys)
    _shared(keys, bits, parted, order, starts, held, count, place, group_of, rows, groups, sizes)
    m, found = sizes.tolist()
    return rows[:m].copy(), groups[:m].copy(), found


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
