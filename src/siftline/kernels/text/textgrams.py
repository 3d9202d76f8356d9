"""Shingle hashes straight from the bytes of a text: fold, find words, roll a hash over n of them.

One row at a time, in buffers that the caller keeps, so that nothing is allocated a row and no
Python object exists. `folding` folds a text, `tokens` finds its words and hashes each to 64 bits,
and `windows` rolls a polynomial over n of them and mixes it down to 32 bits. The other unit is the
character: a code point of the words with single spaces between them.

A text of fewer than n units is one shingle, the whole text; a text without units has none.
"""

import numpy as np
from numba import njit

from siftline.kernels.text.bits import load64
from siftline.kernels.text.folding import decode, rest
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
