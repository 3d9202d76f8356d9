"""The loops of `groups`: they allocate nothing, so that they can be kept compiled (`machine`)."""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def among(keys: np.ndarray, wanted: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Writes to `out` whether each key is wanted; `table` is zeros, four for each wanted one."""
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
def shared(
    keys: np.ndarray,
    bits: int,
    parted: np.ndarray,
    order: np.ndarray,
    starts: np.ndarray,
    held: np.ndarray,
    count: np.ndarray,
    place: np.ndarray,
    group_of: np.ndarray,
    rows: np.ndarray,
    groups: np.ndarray,
    sizes: np.ndarray,
) -> None:
    """Writes the rows whose key another has, their groups, and how many there are of both.

    Args:
        keys: uint64, shape (n,).
        bits: Keys are cut into 2^bits ranges.
        parted: Room for the keys by range, uint64, shape (n,).
        order: Room for their rows, int32, shape (n,).
        starts: Zeros, int64, shape (2^bits + 2,).
        held: Room for a table of keys, uint64, a power of two, at least 2 n.
        count: Room for its counts, int32, as many.
        place: Room for places in it, int32, shape (n,).
        group_of: Room, int32, shape (n,).
        rows: Written, int32, shape (n,).
        groups: Written, int32, shape (n,).
        sizes: Written, int64, shape (2,): rows and groups.
    """
    _partition(keys, bits, parted, order, starts)
    group_of[:] = 0  # from 1
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
    sizes[0] = _in_order(group_of, found, count, rows, groups)
    sizes[1] = found


@njit(cache=True, nogil=True)
def _in_order(
    group_of: np.ndarray, found: int, number: np.ndarray, rows: np.ndarray, groups: np.ndarray
) -> int:
    """Writes the rows that have a group, and these numbered from 0 by their first rows."""
    number[: found + 1] = -1
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
    return written


@njit(cache=True, nogil=True)
def _partition(
    keys: np.ndarray, bits: int, parted: np.ndarray, order: np.ndarray, starts: np.ndarray
) -> None:
    """Orders the keys that are not 0 by their top bits; writes them, their rows, and the starts."""
    for key in keys:
        if key != 0:
            starts[_range(key, bits) + 2] += 1
    for r in range(1 << bits):
        starts[r + 2] += starts[r + 1]
    for i in range(len(keys)):
        key = keys[i]
        if key != 0:
            r = _range(key, bits)
            p = starts[r + 1]
            parted[p] = key
            order[p] = i
            starts[r + 1] = p + 1


@njit(cache=True, nogil=True)
def _range(key: np.uint64, bits: int) -> np.int64:
    return np.int64(key >> np.uint64(64 - bits)) if bits else np.int64(0)
