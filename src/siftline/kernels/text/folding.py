"""A text folded in compiled code: UTF-8 in, UTF-8 of the same text by `codepoints` out.

32 ASCII bytes are lower-cased at once, the last ones of a text 8 at a time in one 64-bit number
(the carry tricks of Lamport's and Warren's byte parallel arithmetic). Other code points go through
the tables. A character that is a word by itself has a zero byte before and after it and its marks.
Where marks follow that may compose or have to be sorted, what is around them is composed (NFC).
"""

from typing import Any

import numpy as np
from numba import njit

from siftline.kernels.text.bits import high32, load64, lower32, store64, trailing_zeros
from siftline.kernels.text.codepoints import (
    EXPANDS,
    FRONT,
    JOINING,
    MARK,
    NOTHING,
    ORDERED,
    SIGN,
    SOLO,
    Tables,
)

_SPACES = np.uint64(0x2020202020202020)
_HIGH = np.uint64(0x8080808080808080)
_FROM_A = np.uint64((0x80 - ord("A")) * 0x0101010101010101)
_PAST_Z = np.uint64((0x80 - ord("Z") - 1) * 0x0101010101010101)
_TO_SMALL = np.uint64(2)
_INVALID = np.int64(0x110000)
_QUOTE = np.uint32(ord('"'))
_RAISED = np.uint32(ord("^"))
_HALF = np.uint64(32)
_SORTED = 30
_L, _V, _T, _S = 0x1100, 0x1161, 0x11A7, 0xAC00
_BEHIND = 80


@njit(cache=True, nogil=True)
def fold(
    data: np.ndarray, start: int, stop: int, out: np.ndarray, tables: Tables, points: np.ndarray
) -> int:
    """Writes data[start:stop], folded, to out[FRONT:]; returns where it ends.

    Args:
        data: UTF-8, uint8. A byte that is not part of any is taken for a quote.
        start: First byte of the text.
        stop: Its end.
        out: uint8, `codepoints.fold_bytes(stop - start)` long; spaces precede and follow what is
            written.
        tables: `codepoints.tables`.
        points: uint32, `codepoints.fold_points(stop - start)` long.
    """
    store64(out, 0, _SPACES)
    store64(out, 8, _SPACES)
    i, at, solo = start, FRONT, False
    while i < stop:
        plain = _ascii_ahead(data, i, stop)
        if plain > 0:
            if solo:
                out[at] = 0
                at += 1
                solo = False
            _lower_step(data, i, stop, out, at)
            at += plain
            i += plain
            # From here on nothing waits for how many bytes the last step took.
            while i + 32 <= stop and high32(data, i) == 0:
                lower32(data, i, out, at)
                at += 32
                i += 32
        if i < stop and data[i] >= 0x80:
            i, at, solo = _others(data, i, stop, out, at, tables, points)
    for k in range(at, at + _BEHIND, 8):
        store64(out, k, _SPACES)
    return at


@njit(cache=True, nogil=True)
def _others(  # noqa: C901, one loop over what stays in registers
    data: np.ndarray,
    i: int,
    stop: int,
    out: np.ndarray,
    at: int,
    tables: Tables,
    points: np.ndarray,
) -> tuple[int, int, bool]:
    """Folds the characters from data[i] on that are not ASCII.

    Returns:
        Where they end, where what was written ends, and whether the last is a word by itself.
    """
    begin = at
    solo: Any = False
    classes, folds, expansions = tables.classes, tables.folds, tables.expansions
    sorted_after, raised, tangled = -1, -1, False
    while i < stop and data[i] >= 0x80:
        found, size = decode(data, i, stop)
        i += size
        point = found if found < _INVALID else np.int64(_QUOTE)
        kind = classes[point]
        if kind == NOTHING:
            continue
        first, count = np.int64(folds[point]), np.int64(1)
        lifts = False
        if kind == EXPANDS:
            count = np.int64(expansions[first])
            first += 1
            lifts = expansions[first] == _RAISED
            if lifts and raised == at:  # another digit of the same exponent
                first += 1
                count -= 1
        for k in range(first, first + count):
            part = np.int64(expansions[k]) if kind == EXPANDS else first
            mine = classes[part] if kind == EXPANDS else kind
            if mine in (MARK, ORDERED, JOINING):
                tangled |= bool(mine == JOINING or (mine == ORDERED and sorted_after == at))
                at = encode(out, at, part)
                if mine == ORDERED:
                    sorted_after = at
                continue
            alone: Any = part >= 0x80 and mine in (SOLO, SIGN)
            if alone or solo:
                out[at] = 0
                at += 1
            solo = alone
            at = encode(out, at, part)
        if lifts:
            raised = at
    if tangled:  # what is composed may be on the ASCII letter before
        at = _composed(out, max(begin - 1, FRONT), at, tables, points)
    return i, at, solo


@njit(cache=True, nogil=True)
def decode(data: np.ndarray, i: int, stop: int) -> tuple[np.int64, int]:
    """The code point at data[i] and its bytes; (0x110000, 1) where there is none."""
    c = data[i]
    if c < 0x80:
        return np.int64(c), 1
    if c < 0xC2 or c > 0xF4:
        return _INVALID, 1
    size = 2 if c < 0xE0 else 3 if c < 0xF0 else 4
    if i + size > stop:
        return _INVALID, 1
    point = np.int64(c) & (0x7F >> size)
    for k in range(1, size):
        follows = np.int64(data[i + k])
        if follows & 0xC0 != 0x80:
            return _INVALID, 1
        point = (point << 6) | (follows & 0x3F)
    return (point, size) if point < _INVALID else (_INVALID, 1)


@njit(cache=True, nogil=True)
def encode(out: np.ndarray, at: int, point: int) -> int:
    """Writes one code point as UTF-8; returns the next free place."""
    if point < 0x80:
        out[at] = point
        return at + 1
    if point < 0x800:
        out[at] = 0xC0 | (point >> 6)
        out[at + 1] = 0x80 | (point & 0x3F)
        return at + 2
    if point < 0x10000:
        out[at] = 0xE0 | (point >> 12)
        out[at + 1] = 0x80 | ((point >> 6) & 0x3F)
        out[at + 2] = 0x80 | (point & 0x3F)
        return at + 3
    out[at] = 0xF0 | (point >> 18)
    out[at + 1] = 0x80 | ((point >> 12) & 0x3F)
    out[at + 2] = 0x80 | ((point >> 6) & 0x3F)
    out[at + 3] = 0x80 | (point & 0x3F)
    return at + 4


@njit(cache=True, nogil=True, forceinline=True)
def rest(data: np.ndarray, start: int, stop: int) -> np.uint64:
    """The at most eight bytes data[start:stop], and zeros."""
    x = np.uint64(0)
    for k in range(min(stop - start, 8)):
        x |= np.uint64(data[start + k]) << np.uint64(8 * k)
    return x


@njit(cache=True, nogil=True, forceinline=True)
def _ascii_ahead(data: np.ndarray, i: int, stop: int) -> int:
    """How many ASCII bytes there are from data[i] on, counted no further than one step folds."""
    if i + 32 <= stop:
        return min(trailing_zeros(high32(data, i)), 32)
    x = load64(data, i) if i + 8 <= stop else rest(data, i, stop)
    return min(trailing_zeros(x & _HIGH) >> 3, stop - i)


@njit(cache=True, nogil=True, forceinline=True)
def _lower_step(data: np.ndarray, i: int, stop: int, out: np.ndarray, at: int) -> None:
    """Folds the bytes that `_ascii_ahead` looked at; those behind them are written over later."""
    if i + 32 <= stop:
        lower32(data, i, out, at)
    else:
        x = load64(data, i) if i + 8 <= stop else rest(data, i, stop)
        capital = ((x + _FROM_A) & ~(x + _PAST_Z)) & _HIGH
        store64(out, at, x | (capital >> _TO_SMALL))


@njit(cache=True, nogil=True)
def _composed(out: np.ndarray, start: int, end: int, tables: Tables, points: np.ndarray) -> int:
    """Brings out[start:end] to normal form C in place; returns where it ends then."""
    n, i = 0, start
    while i < end:
        point, size = decode(out, i, end)
        i += size
        n = _taken_apart(points, n, point, tables)
    _sort_marks(points, n, tables.orders)
    n = _put_together(points, n, tables)
    at = start
    for k in range(n):
        at = encode(out, at, np.int64(points[k]))
    return at


@njit(cache=True, nogil=True)
def _taken_apart(points: np.ndarray, n: int, point: int, tables: Tables) -> Any:
    """Writes the canonical decomposition of one code point to points[n:]; returns the end."""
    if _S <= point < _S + 11172:
        index = point - _S
        points[n] = _L + index // 588
        points[n + 1] = _V + index % 588 // 28
        points[n + 2] = _T + index % 28
        return n + 2 + (index % 28 > 0)
    if point >= 0xC0:
        key = np.uint64(point) << _HALF
        k = np.searchsorted(tables.decomposed, key)
        if k < len(tables.decomposed) and tables.decomposed[k] >> _HALF == np.uint64(point):
            first = np.int64(tables.decomposed[k] & np.uint64(0xFFFFFFFF))
            count = np.int64(tables.expansions[first])
            for p in range(count):
                points[n + p] = tables.expansions[first + 1 + p]
            return n + count
    points[n] = point
    return n + 1


@njit(cache=True, nogil=True)
def _sort_marks(points: np.ndarray, n: int, orders: np.ndarray) -> None:
    """Sorts the marks behind a letter by their order, the first `_SORTED` of a run at a time.

    More than that (Unicode's Stream-Safe Text Format has 30) is no writing, and a run of a million
    marks would take a million squared steps.
    """
    for k in range(1, n):
        order = orders[points[k]]
        p = k
        least = max(k - _SORTED, 0)
        while order > 0 and p > least and orders[points[p - 1]] > order:
            points[p], points[p - 1] = points[p - 1], points[p]
            p -= 1


@njit(cache=True, nogil=True)
def _put_together(points: np.ndarray, n: int, tables: Tables) -> int:
    """Composes points[:n] in place by the canonical algorithm; returns how many are left."""
    starter, found, last = -1, 0, np.uint8(0)
    for k in range(n):
        point = points[k]
        order = tables.orders[point]
        if starter >= 0 and (starter == found - 1 or (last < order and last > 0)):
            both = _both(np.int64(points[starter]), np.int64(point), tables)
            if both > 0:
                points[starter] = both
                continue
        if order == 0:
            starter = found
        points[found] = point
        last = order
        found += 1
    return found


@njit(cache=True, nogil=True)
def _both(first: int, second: int, tables: Tables) -> Any:
    """What two code points compose to; 0 where they do not."""
    if _L <= first < _L + 19 and _V <= second < _V + 21:
        return _S + ((first - _L) * 21 + second - _V) * 28
    if _S <= first < _S + 11172 and (first - _S) % 28 == 0 and _T < second < _T + 28:
        return first + second - _T
    key = (np.uint64(first) << _HALF) | np.uint64(second)
    k = np.searchsorted(tables.pairs, key)
    if k < len(tables.pairs) and tables.pairs[k] == key:
        return np.int64(tables.composed[k])
    return 0
