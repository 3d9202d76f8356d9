"""Shingle hashes straight from the bytes of a text: fold, find words, roll a hash over n of them.

One row at a time, in buffers that the caller keeps, so that nothing is allocated a row and no
Python object exists. `folding` folds a text, `tokens` finds its words and hashes each to 64 bits,
and `windows` rolls a polynomial over n of them and mixes it down to 32 bits. The other unit is the
character: a code point of the words with single spaces between them.

A text of fewer than n units is one shingle, the whole text; a text without units has none.

One hash for the quantities of a text, `text.numbers`, of many texts in compiled code.
"""

from functools import cache

import numpy as np
from numba import njit

from siftline.kernels.text.bits import load64
from siftline.kernels.text.folding import decode, rest
from siftline.kernels.text.tokens import hashed
from siftline.kernels.text.words import NUMBER_WORDS, WordTexts
from siftline.kernels.text.words_reference import words_reference

_G = np.uint64(0x9E3779B97F4A7C15)
_F = np.uint64(0xBF58476D1CE4E5B9)
_B = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
_ONE = np.uint64(1)
_MASK = 0xFFFFFFFFFFFFFFFF


@njit(cache=True, nogil=True)
def character_units(words: np.ndarray, start: int, stop: int, out: np.ndarray) -> int:
    """Hashes the code points of words[start:stop]; returns how many there are.

    Args:
        words: UTF-8, uint8, as `tokens.write_words` writes it.
        start: Where the text begins.
        stop: Where it ends.
        out: uint64, at least stop - start long.
    """
    found = 0
    while start < stop:
        point, size = decode(words, start, stop)
        start += size
        out[found] = _unit(np.uint64(point))
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
    found = count - size + 1
    leaving = _ONE
    for _ in range(size):
        leaving *= _B
    salt = np.uint64(size) * _G
    # Two halves side by side: within one, each hash waits for the one before.
    half = found >> 1
    h, g = _polynomial(units, size), _polynomial(units[half:], size)
    later, coming, last = units[half:], units[size:], units[half + size :]
    lower, upper = out[1:], out[half:]
    out[0], upper[0] = _mixed(h + salt), _mixed(g + salt)
    after = upper[1:]
    for i in range(half - 1):
        h = h * _B + (coming[i] - units[i] * leaving)
        g = g * _B + (last[i] - later[i] * leaving)
        lower[i] = _mixed(h + salt)
        after[i] = _mixed(g + salt)
    if half > 0 and found & 1:
        g = g * _B + (last[half - 1] - later[half - 1] * leaving)
        upper[half] = _mixed(g + salt)
    return found


@njit(cache=True, nogil=True, forceinline=True)
def _polynomial(units: np.ndarray, size: int) -> np.uint64:
    h = np.uint64(0)
    for i in range(size):
        h = h * _B + units[i]
    return h


@njit(cache=True, nogil=True)
def text_hash(data: np.ndarray, start: int, stop: int) -> np.uint64:
    """A 64-bit hash of the bytes data[start:stop] as they are."""
    h0 = np.uint64(stop - start) * _G
    h1, h2, h3 = h0 ^ _B, h0 + _F, h0 ^ _G
    i = start
    while i + 32 <= stop:  # four at once, as none waits for another
        h0 = (h0 ^ load64(data, i)) * _G
        h1 = (h1 ^ load64(data, i + 8)) * _F
        h2 = (h2 ^ load64(data, i + 16)) * _B
        h3 = (h3 ^ load64(data, i + 24)) * _G
        h0 ^= h0 >> _HALF
        h1 ^= h1 >> _HALF
        h2 ^= h2 >> _HALF
        h3 ^= h3 >> _HALF
        i += 32
    h0 = (h0 ^ rest(data, i, stop)) * _G
    h1 = (h1 ^ rest(data, i + 8, stop)) * _F
    h2 = (h2 ^ rest(data, i + 16, stop)) * _B
    h3 = (h3 ^ rest(data, i + 24, stop)) * _G
    left = ((h0 ^ (h0 >> _HALF)) * _F + (h1 ^ (h1 >> _HALF))) * _G
    right = ((h2 ^ (h2 >> _HALF)) * _F + (h3 ^ (h3 >> _HALF))) * _B
    h = ((left ^ (left >> _HALF)) * _F + right) * _G
    return h ^ (h >> _HALF)


def shingles_reference(text: str, n: int, characters: bool = False) -> list[int]:
    """The shingle hashes of one text in order, in plain Python."""
    if characters:
        units = [_unit_reference(ord(char)) for char in " ".join(words_reference(text))]
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
    while len(raw) > 16:
        h = (h ^ int.from_bytes(raw[:8], "little")) * int(_G) & _MASK
        h ^= h >> 32
        raw = raw[8:]
    first, second = (int.from_bytes(part, "little") for part in (raw[:8], raw[8:]))
    h = ((h ^ first) * int(_G) + second * int(_F)) & _MASK
    return h ^ (h >> 32)


def _unit_reference(point: int) -> int:
    h = (point + 1) * int(_G) & _MASK
    return h ^ (h >> 32)


@njit(cache=True, nogil=True)
def _unit(point: np.uint64) -> np.uint64:
    h = (point + _ONE) * _G
    return h ^ (h >> _HALF)


@njit(cache=True, nogil=True)
def _mixed(h: np.uint64) -> np.uint32:
    return np.uint32(((h ^ (h >> _HALF)) * _F) >> _HALF)


_BETWEEN = 0x1F
_WORD, _NUMBER, _SIGN, _QUANTITY = range(4)


def guards(texts: WordTexts) -> np.ndarray:
    """A hash of the quantities of each text, uint64; texts of the same quantities have the same."""
    return _guards(texts.data, texts.offsets, *_shapes())


def quantities(texts: WordTexts) -> list[tuple[str, ...]]:
    """What `guards` hashes of each text: `text.numbers`."""
    found = []
    for a, b in zip(texts.offsets[:-1], texts.offsets[1:], strict=True):
        out = np.empty(2 * (b - a) + 8, np.uint8)
        size = _kept(texts.data, a, b, *_shapes(), out)
        parts = bytes(out[:size]).decode().split(chr(_BETWEEN))
        found.append(tuple(parts[:-1]))
    return found


@cache
def _shapes() -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the number words, ascending; whether one has this first letter and length."""
    known = [np.frombuffer(word.encode() + b"\0" * 16, np.uint8) for word in NUMBER_WORDS]
    hashes = np.array([hashed(word, 0, len(word) - 16) for word in known], np.uint64)
    shapes = np.zeros((256, 16), np.bool_)
    for word in NUMBER_WORDS:
        shapes[ord(word[0]), len(word)] = True
    return np.sort(hashes), shapes


@njit(cache=True, nogil=True)
def _guards(
    data: np.ndarray, offsets: np.ndarray, known: np.ndarray, shapes: np.ndarray
) -> np.ndarray:
    n, longest = len(offsets) - 1, np.int64(0)
    for i in range(n):
        longest = max(longest, offsets[i + 1] - offsets[i])
    out, hashes = np.empty(2 * longest + 8, np.uint8), np.empty(n, np.uint64)
    for i in range(n):
        size = _kept(data, offsets[i], offsets[i + 1], known, shapes, out)
        hashes[i] = text_hash(out, 0, size)
    return hashes


@njit(cache=True, nogil=True)
def _kept(
    data: np.ndarray,
    begin: int,
    end: int,
    known: np.ndarray,
    shapes: np.ndarray,
    out: np.ndarray,
) -> int:
    """Writes the quantities of data[begin:end], each with _BETWEEN behind it; returns the bytes."""
    at, k = 0, begin
    last, letter = _WORD, False  # what the word before was
    leads, looked = False, begin - 1  # what `_leads` said, and up to where it holds
    while k < end:
        stop, digits = k, False
        while stop < end and data[stop] != 32:
            digits |= 48 <= data[stop] <= 57
            stop += 1
        kind = _NUMBER if digits else _kind(data, k, end)
        if digits:
            at = _write_numbers(data, k, stop, out, at)
        else:
            after = _letter(data, stop + 1, end)
            ends = stop >= end
            sure = _sure(data, k, stop, kind, last, letter, after, ends, known, shapes)
            if not sure and kind >= _SIGN:
                if stop + 1 > looked:  # a run of signs is looked through once
                    leads, looked = _leads(data, stop + 1, end)
                sure = leads
            if sure:
                for p in range(k, stop):
                    out[at] = data[p]
                    at += 1
                out[at] = _BETWEEN
                at += 1
        last, letter = kind, _letter(data, k, end)
        k = stop + 1
    return at


@njit(cache=True, nogil=True)
def _sure(
    data: np.ndarray,
    k: int,
    stop: int,
    kind: int,
    last: int,
    before: bool,
    after: bool,
    ends: bool,
    known: np.ndarray,
    shapes: np.ndarray,
) -> bool:
    """Whether a word without digits is kept, whatever is behind it but a single letter."""
    char, size = data[k], stop - k
    if 97 <= char <= 122:
        if size > 15 or not shapes[char, size]:
            return False
        return _among(data, k, stop, known)
    if char == 33:  # ! at the end is one of prose
        return not ends
    if char in (60, 62, 61, 94, 43, 46):  # < > = ^ + .
        return True
    if last == _NUMBER and (char == 37 or kind == _QUANTITY):
        return True
    if char == 35:
        return before
    if char in (45, 42, 47, 126, 124, 38):  # - * / ~ | &
        double = size == 2 and (char == 38 or char == 124)
        return double or before or after
    return False


@njit(cache=True, nogil=True)
def _kind(data: np.ndarray, k: int, end: int) -> int:
    char = data[k]
    if char >= 0x80:
        point, _ = decode(data, k, end)
        near = 0xA2 <= point <= 0xA5 or 0xB0 <= point <= 0xB1 or 0x2030 <= point <= 0x2031
        if near or 0x20A0 <= point <= 0x20CF or 0x2200 <= point <= 0x22FF:
            return _QUANTITY
        return _WORD
    if char in (43, 45, 42, 47, 94, 60, 62, 61, 126, 36, 40, 91, 123, 41, 93, 125):
        return _SIGN
    return _WORD


@njit(cache=True, nogil=True)
def _leads(data: np.ndarray, k: int, end: int) -> tuple[bool, int]:
    """Whether signs alone stand from k on before a number, and where the word is that decides."""
    while k < end:
        stop, digits = k, False
        while stop < end and data[stop] != 32:
            digits |= 48 <= data[stop] <= 57
            stop += 1
        if digits:
            return True, k
        if _kind(data, k, end) < _SIGN:
            return False, k
        k = stop + 1
    return False, end


@njit(cache=True, nogil=True)
def _write_numbers(data: np.ndarray, k: int, stop: int, out: np.ndarray, at: int) -> int:
    """Writes the numbers of the word data[k:stop]; returns where they end."""
    while k < stop:
        if not 48 <= data[k] <= 57:
            k += 1
            continue
        while k < stop:
            char = data[k]
            if 48 <= char <= 57:
                out[at] = char
                at += 1
            elif char in (46, 44, 59, 39) and k + 1 < stop and 48 <= data[k + 1] <= 57:
                if char != 44 or not _thousand(data, k + 1, stop):
                    out[at] = char
                    at += 1
            else:
                break
            k += 1
        out[at] = _BETWEEN
        at += 1
    return at


@njit(cache=True, nogil=True)
def _thousand(data: np.ndarray, k: int, stop: int) -> bool:
    """Whether exactly three digits are at k."""
    size = 0
    while k + size < stop and size < 4 and 48 <= data[k + size] <= 57:
        size += 1
    return size == 3


@njit(cache=True, nogil=True)
def _letter(data: np.ndarray, k: int, end: int) -> bool:
    """Whether the word at k is a single small letter."""
    return k < end and 97 <= data[k] <= 122 and (k + 1 == end or data[k + 1] == 32)


@njit(cache=True, nogil=True)
def _among(data: np.ndarray, k: int, stop: int, known: np.ndarray) -> bool:
    """Whether the word data[k:stop], of at most 15 bytes, is one of those hashed."""
    word = np.zeros(32, np.uint8)
    for p in range(stop - k):
        word[p] = data[k + p]
    h = hashed(word, 0, stop - k)
    place = np.searchsorted(known, h)
    return place < len(known) and known[place] == h
