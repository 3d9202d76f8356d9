"""Shingle hashes straight from the bytes of a text: fold, find words, roll a hash over n of them.

One row at a time, in buffers that the caller keeps, so that nothing is allocated a row and no
Python object exists. Three steps, each a compiled function with a plain reference beside it:

1. `fold_words` writes the text lower-cased, with zero bytes where words part. 32 ASCII bytes are
   done at once, the last ones of a text 8 at a time in one 64-bit number (the carry tricks of
   Lamport's and Warren's byte parallel arithmetic); other code points go through the tables of
   `codepoints`.
2. `word_units` makes one bit of each byte, 64 at a time, finds where words start and end by bit
   operations, and hashes each word to 64 bits, eight bytes at a time. `fold_characters` is the
   other unit: code points, folded, runs of spaces as one.
3. `windows` rolls a polynomial over n units and mixes it down to 32 bits.

A text of fewer than n units is one shingle, the whole text; a text without units has none.
"""

import numpy as np
from numba import njit

from siftline.kernels.bits import filled64, fold32, high32, load64, store64, trailing_zeros
from siftline.kernels.codepoints import (
    MARK,
    NOTHING,
    PARTS,
    SOLO,
    SPACE,
    WORD,
    class_reference,
    fold_reference,
)

_G = np.uint64(0x9E3779B97F4A7C15)
_F = np.uint64(0xBF58476D1CE4E5B9)
_B = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
_ONE = np.uint64(1)
_THREE = np.uint64(3)
_SEVEN = np.uint64(7)
_BYTE = np.uint64(0xFF)
_ONES = np.uint64(0x0101010101010101)
_HIGH = np.uint64(0x8080808080808080)
_LOWER = np.uint64(0x2020202020202020)
# Adding these to bytes below 0x80 sets the high bit of those that are at least ...
_FROM_A = np.uint64((0x80 - ord("a")) * 0x0101010101010101)
_PAST_Z = np.uint64((0x80 - ord("z") - 1) * 0x0101010101010101)
_FROM_0 = np.uint64((0x80 - ord("0")) * 0x0101010101010101)
_PAST_9 = np.uint64((0x80 - ord("9") - 1) * 0x0101010101010101)
# By the bytes that are left of a word, 0 to 15: those of the first eight, of the second.
_FIRST = np.array([(1 << 8 * min(size, 8)) - 1 for size in range(16)], np.uint64)
_SECOND = np.array([(1 << 8 * max(size - 8, 0)) - 1 for size in range(16)], np.uint64)
_BLOCK = 64
_LAST = np.uint64(63)
_INVALID = np.int64(0x110000)
_MASK = 0xFFFFFFFFFFFFFFFF


@njit(cache=True, nogil=True)
def fold_words(
    data: np.ndarray,
    start: int,
    stop: int,
    out: np.ndarray,
    classes: np.ndarray,
    folds: np.ndarray,
) -> int:
    """Writes data[start:stop], folded, with zero bytes between words; returns the bytes written.

    Args:
        data: UTF-8, uint8. Bytes that are not part words.
        start: First byte of the text.
        stop: Its end.
        out: uint8, at least 2 * (stop - start) + ROOM long; zeros follow what is written.
        classes: Of code points, `codepoints.tables`.
        folds: Of code points.
    """
    i, at, solo = start, 0, False
    while i < stop:
        plain = _ascii_ahead(data, i, stop)
        if plain > 0:
            if solo:
                out[at] = 0
                at += 1
                solo = False
            _fold_step(data, i, stop, out, at)
            at += plain
            i += plain
        # One character after another: what is not ASCII seldom stands alone.
        while i < stop and data[i] >= 0x80:
            point, size = _decode(data, i, stop)
            i += size
            kind = classes[point] if point < _INVALID else PARTS
            if kind == NOTHING:
                continue
            if kind != MARK:
                if kind != WORD or solo:
                    out[at] = 0
                    at += 1
                solo = kind == SOLO
            if kind in (WORD, MARK, SOLO):
                at = _encode(out, at, folds[point])
    for k in range(at, at + _BLOCK + 8, 8):
        store64(out, k, np.uint64(0))
    return at


@njit(cache=True, nogil=True)
def word_units(folded: np.ndarray, length: int, out: np.ndarray) -> int:
    """Hashes the words of `fold_words`; returns how many there are.

    Args:
        folded: uint8, zeros between words and in the 64 bytes after the last.
        length: Bytes of it.
        out: uint64, one for each word; length // 2 + 1 always suffice.
    """
    found, start = 0, 0
    carried = np.uint64(0)  # 1 while a word runs over the end of a block
    for base in range(0, length + 1, _BLOCK):
        bits = filled64(folded, base)
        before = (bits << _ONE) | carried
        starts, ends = bits & ~before, ~bits & before
        if carried == 0:
            start = base + trailing_zeros(starts)
            starts &= starts - _ONE
        while ends != 0:
            stop = base + trailing_zeros(ends)
            ends &= ends - _ONE
            out[found] = _word(folded, start, stop)
            found += 1
            start = base + trailing_zeros(starts)
            starts &= starts - _ONE
        carried = bits >> _LAST
    return found


@njit(cache=True, nogil=True)
def fold_characters(
    data: np.ndarray,
    start: int,
    stop: int,
    out: np.ndarray,
    classes: np.ndarray,
    folds: np.ndarray,
) -> int:
    """Writes one unit a character: folded, runs of spaces as one, none at the ends.

    Args:
        data: UTF-8, uint8.
        start: First byte of the text.
        stop: Its end.
        out: uint64, at least stop - start long.
        classes: Of code points.
        folds: Of code points.

    Returns:
        Units written.
    """
    i, found, gap = start, 0, False
    while i < stop:
        point, size = _decode(data, i, stop)
        i += size
        kind = classes[point] if point < _INVALID else PARTS
        if kind == SPACE:
            gap = found > 0
        elif kind != NOTHING:
            if gap:
                out[found] = _unit(np.uint64(32))
                found += 1
                gap = False
            out[found] = _unit(np.uint64(folds[point] if point < _INVALID else point))
            found += 1
    return found


@njit(cache=True, nogil=True)
def windows(units: np.ndarray, count: int, n: int, out: np.ndarray) -> int:
    """Hashes every window of n units to 32 bits; returns how many there are.

    Args:
        units: uint64.
        count: Units there are.
        n: Units in a window.
        out: uint32, at least count long.
    """
    if count == 0:
        return 0
    size = min(n, count)
    h, leaving = np.uint64(0), _ONE
    for i in range(size):
        h = h * _B + units[i]
        leaving *= _B
    salt = np.uint64(size) * _G
    out[0] = _mixed(h + salt)
    coming, after = units[size:count], out[1:]
    for i in range(count - size):
        h = h * _B + (coming[i] - units[i] * leaving)
        after[i] = _mixed(h + salt)
    return count - size + 1


@njit(cache=True, nogil=True)
def text_hash(data: np.ndarray, start: int, stop: int) -> np.uint64:
    """A 64-bit hash of the bytes data[start:stop] as they are."""
    left = np.uint64(stop - start) * _G
    right = left ^ _B
    i = start
    while i + 16 <= stop:
        left = (left ^ load64(data, i)) * _G
        right = (right ^ load64(data, i + 8)) * _F
        left ^= left >> _HALF
        right ^= right >> _HALF
        i += 16
    left = (left ^ _rest(data, i, stop)) * _G
    right = (right ^ _rest(data, i + 8, stop)) * _F
    h = ((left ^ (left >> _HALF)) * _F + (right ^ (right >> _HALF))) * _G
    return h ^ (h >> _HALF)


def words_reference(text: str) -> list[str]:
    """The words of one text, as `fold_words` parts and folds them."""
    words: list[str] = [""]
    solo = False
    for char in text:
        kind = class_reference(char)
        if kind in (WORD, MARK):
            if solo and kind == WORD:
                words.append("")
                solo = False
            words[-1] += fold_reference(char)
        elif kind == SOLO:
            words.append(fold_reference(char))
            solo = True
        elif kind != NOTHING:
            words.append("")
            solo = False
    return [word for word in words if word]


def characters_reference(text: str) -> str:
    """One text as `fold_characters` folds it."""
    marked = "".join(
        " " if class_reference(char) == SPACE else fold_reference(char)
        for char in text
        if class_reference(char) != NOTHING
    )
    return " ".join(part for part in marked.split(" ") if part)


def shingles_reference(text: str, n: int, characters: bool = False) -> list[int]:
    """The shingle hashes of one text in order, in plain Python."""
    if characters:
        units = [_unit_reference(ord(char)) for char in characters_reference(text)]
    else:
        units = [_word_reference(word) for word in words_reference(text)]
    size = min(n, len(units))
    hashes = []
    for start in range(len(units) - size + 1 if units else 0):
        h = 0
        for unit in units[start : start + size]:
            h = (h * int(_B) + unit) & _MASK
        h = (h + size * int(_G)) & _MASK
        hashes.append(((h ^ (h >> 32)) * int(_F) & _MASK) >> 32)
    return hashes


def _word_reference(word: str) -> int:
    raw = word.encode()
    h = 0
    for at in range(0, len(raw) + 1, 8):  # eight bytes are followed by an empty block
        h = (h ^ int.from_bytes(raw[at : at + 8], "little")) * int(_G) & _MASK
        h ^= h >> 32
    return h


def _unit_reference(point: int) -> int:
    h = (point + 1) * int(_G) & _MASK
    return h ^ (h >> 32)


@njit(cache=True, nogil=True)
def _ascii_ahead(data: np.ndarray, i: int, stop: int) -> int:
    """How many ASCII bytes there are from data[i] on, counted no further than one step folds."""
    if i + 32 <= stop:
        return min(trailing_zeros(high32(data, i)), 32)
    x = load64(data, i) if i + 8 <= stop else _rest(data, i, stop)
    return min(trailing_zeros(x & _HIGH) >> 3, stop - i)


@njit(cache=True, nogil=True)
def _fold_step(data: np.ndarray, i: int, stop: int, out: np.ndarray, at: int) -> None:
    """Folds the bytes that `_ascii_ahead` looked at; those behind them are written over later."""
    if i + 32 <= stop:
        fold32(data, i, out, at)
    else:
        x = load64(data, i) if i + 8 <= stop else _rest(data, i, stop)
        store64(out, at, _fold_ascii(x))


@njit(cache=True, nogil=True)
def _rest(data: np.ndarray, start: int, stop: int) -> np.uint64:
    """The at most eight bytes data[start:stop], and zeros."""
    x = np.uint64(0)
    for k in range(min(stop - start, 8)):
        x |= np.uint64(data[start + k]) << np.uint64(8 * k)
    return x


@njit(cache=True, nogil=True)
def _fold_ascii(x: np.uint64) -> np.uint64:
    low = x | _LOWER
    letter = (low + _FROM_A) & ~(low + _PAST_Z)
    digit = (x + _FROM_0) & ~(x + _PAST_9)
    known = ((letter | digit) & _HIGH) >> _SEVEN
    return low & (known * _BYTE)


@njit(cache=True, nogil=True)
def _word(data: np.ndarray, start: int, stop: int) -> np.uint64:
    h = np.uint64(0)
    while stop - start >= 16:
        h = (h ^ load64(data, start)) * _G
        h ^= h >> _HALF
        start += 8
    # Both endings are computed and one taken: a jump on the length would often be guessed wrong.
    size = (stop - start) & 15  # never more; said so that no index is tested
    first = load64(data, start) & _FIRST[size]
    second = load64(data, start + 8) & _SECOND[size]
    short = (h ^ first) * _G
    short ^= short >> _HALF
    long = (short ^ second) * _G
    long ^= long >> _HALF
    return long if size >= 8 else short


@njit(cache=True, nogil=True)
def _decode(data: np.ndarray, i: int, stop: int) -> tuple[np.int64, int]:
    """The code point at data[i] and its bytes; (_INVALID, 1) where there is none."""
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
def _encode(out: np.ndarray, at: int, point: int) -> int:
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


@njit(cache=True, nogil=True)
def _unit(point: np.uint64) -> np.uint64:
    h = (point + _ONE) * _G
    return h ^ (h >> _HALF)


@njit(cache=True, nogil=True)
def _mixed(h: np.uint64) -> np.uint32:
    return np.uint32(((h ^ (h >> _HALF)) * _F) >> _HALF)
