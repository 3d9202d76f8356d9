"""Sets of hashed shingles in compressed rows: sorted distinct hashes and offsets, no objects.

Character shingles (32 bit, what MinHash reads) measure how similar two texts are: a changed letter
costs at most n of them, so short texts degrade gently, and scripts without spaces work. Word
n-grams (64 bit) look for copied passages, where one false hit in billions of look-ups matters.

A text shorter than one shingle is one shingle, the whole text; an empty text has none. The hash is
over code points: h = n * G, then h = (h ^ unit) * G; h ^= h >> 29 for each unit, then a finaliser.
32-bit hashes add, by chance, at most |A| * |B| / 2^32 to an intersection: under 1e-4 of one shingle
for texts of 500.

MinHash signatures over compressed rows, bit-equal to datasketch 2.0's `affine32` scheme.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from siftline.kernels.text.texts import permutations

_G = np.uint64(0x9E3779B97F4A7C15)
_F = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(29)
_HALF = np.uint64(32)
_SPACE = np.uint64(32)
_MASK = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Sets:
    """n sets of hashes as compressed rows.

    Attributes:
        values: Hashes, ascending and distinct within a row, shape (total,).
        offsets: int64, shape (n + 1,); row i is values[offsets[i]:offsets[i + 1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, i: int) -> np.ndarray:
        """The hashes of set i."""
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    @property
    def sizes(self) -> np.ndarray:
        """Number of hashes in each set, int64, shape (n,)."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "Sets":
        """The sets at positions `rows`, in that order."""
        sizes = self.sizes[rows]
        offsets = _offsets(sizes)
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][rows] - offsets[:-1], sizes)
        return Sets(self.values[index], offsets)


def concatenate(parts: Sequence[Sets]) -> Sets:
    """Stacks sets of the same hash width."""
    sizes = np.concatenate([part.sizes for part in parts])
    return Sets(np.concatenate([part.values for part in parts]), _offsets(sizes))


def char_shingles(texts: Sequence[str], n: int) -> Sets:
    """Distinct character n-grams of each text, hashed to uint32."""
    values, offsets = _windows(*code_points(texts), n)
    out, found = np.empty(len(values), np.uint32), np.zeros(len(offsets), np.int64)
    _distinct_halves(values, offsets, out, found)
    return Sets(out[: found[-1]].copy(), found)


def word_grams(texts: Sequence[str], n: int) -> Sets:
    """Distinct word n-grams of each text (words parted by single spaces), hashed to uint64."""
    units, offsets = _word_units(*code_points(texts))
    return Sets(*_distinct(*_windows(units, offsets, n)))


def hash_window_reference(units: Sequence[int]) -> int:
    """The 64-bit hash of one window of units in plain Python."""
    h = len(units) * int(_G) & _MASK
    for unit in units:
        h = (h ^ unit) * int(_G) & _MASK
        h ^= h >> 29
    h = h * int(_F) & _MASK
    return h ^ (h >> 32)


def char_shingles_reference(text: str, n: int) -> set[int]:
    """What `char_shingles` computes for one text, with Python sets."""
    grams = {text[i : i + n] for i in range(max(len(text) - n + 1, 1))} - {""}
    return {hash_window_reference([ord(c) for c in gram]) & 0xFFFFFFFF for gram in grams}


def word_grams_reference(text: str, n: int) -> set[int]:
    """What `word_grams` computes for one text, with Python sets."""
    units = [hash_window_reference([ord(c) for c in word]) for word in text.split(" ") if word]
    starts = range(max(len(units) - n + 1, 1)) if units else ()
    return {hash_window_reference(units[i : i + n]) for i in starts}


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def code_points(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The code points of some texts one after another, uint64, and where each starts, int64."""
    # A lone surrogate is not valid UTF-32 but does occur in scraped JSON.
    raw = "".join(texts).encode("utf-32-le", "surrogatepass")
    sizes = np.fromiter((len(text) for text in texts), np.int64, len(texts))
    return np.frombuffer(raw, dtype="<u4").astype(np.uint64), _offsets(sizes)


@njit(cache=True)
def _hash_window(units: np.ndarray, start: int, stop: int) -> np.uint64:
    h = np.uint64(stop - start) * _G
    for i in range(start, stop):
        h = (h ^ units[i]) * _G
        h ^= h >> _SHIFT
    h = h * _F
    return h ^ (h >> _HALF)


@njit(cache=True)
def _windows(units: np.ndarray, offsets: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    rows = len(offsets) - 1
    out_offsets = np.zeros(rows + 1, np.int64)
    for i in range(rows):
        size = offsets[i + 1] - offsets[i]
        out_offsets[i + 1] = out_offsets[i] + (max(size - n + 1, 1) if size else 0)
    out = np.empty(out_offsets[rows], np.uint64)
    for i in range(rows):
        for k in range(out_offsets[i + 1] - out_offsets[i]):
            start = offsets[i] + k
            out[out_offsets[i] + k] = _hash_window(units, start, min(start + n, offsets[i + 1]))
    return out, out_offsets


@njit(cache=True)
def _word_units(units: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = len(offsets) - 1
    out = np.empty(len(units), np.uint64)
    out_offsets = np.zeros(rows + 1, np.int64)
    found = 0
    for i in range(rows):
        start = offsets[i]
        for k in range(offsets[i], offsets[i + 1] + 1):
            if k == offsets[i + 1] or units[k] == _SPACE:
                if k > start:
                    out[found] = _hash_window(units, start, k)
                    found += 1
                start = k + 1
        out_offsets[i + 1] = found
    return out[:found].copy(), out_offsets


@njit(cache=True)
def _distinct(values: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = np.empty_like(values)
    out_offsets = np.zeros_like(offsets)
    found = 0
    for i in range(len(offsets) - 1):
        row = np.sort(values[offsets[i] : offsets[i + 1]])
        for k in range(len(row)):
            if k == 0 or row[k] != row[k - 1]:
                out[found] = row[k]
                found += 1
        out_offsets[i + 1] = found
    return out[:found].copy(), out_offsets


@njit(cache=True)
def _distinct_halves(
    values: np.ndarray, offsets: np.ndarray, out: np.ndarray, found: np.ndarray
) -> None:
    """The distinct low halves of hashes, row by row."""
    longest = np.int64(0)
    for i in range(len(offsets) - 1):
        longest = max(longest, offsets[i + 1] - offsets[i])
    row, ends = np.empty(longest, np.uint32), np.empty(2 * longest + 3, np.int32)
    for i in range(len(offsets) - 1):
        count = offsets[i + 1] - offsets[i]
        for p in range(count):
            row[p] = np.uint32(values[offsets[i] + p])
        found[i + 1] = found[i] + write_distinct(row, count, out, found[i], ends)


@njit(cache=True, nogil=True)
def write_distinct(
    shingles: np.ndarray, count: int, out: np.ndarray, start: int, ends: np.ndarray
) -> int:
    """Writes the distinct of shingles[:count], ascending, to out[start:]; returns how many.

    Hashes are spread evenly: one pass into as many ranges as there are hashes all but sorts them.
    `ends` is room for the ranges: int32, twice the count and three more.
    """
    if count == 0:
        return 0
    bits = 1
    while (1 << bits) < count:
        bits += 1
    shift = np.uint32(32 - bits)
    ends[: (1 << bits) + 1] = 0
    for p in range(count):
        ends[np.int64(shingles[p] >> shift) + 1] += 1
    total = np.int32(0)
    for r in range((1 << bits) + 1):
        total += ends[r]
        ends[r] = total
    row = out[start : start + count]
    for p in range(count):
        value = shingles[p]
        of = np.int64(value >> shift)
        row[np.uint32(ends[of])] = value
        ends[of] += 1
    highest = row[0]
    for p in range(1, count):
        value = row[p]
        if highest <= value:
            highest = value
            continue
        q = p
        while q > 0 and row[q - 1] > value:
            row[q] = row[q - 1]
            q -= 1
        row[q] = value
    found, last = 1, row[0]
    for p in range(1, count):
        value = row[p]
        row[found] = value
        found += value != last
        last = value
    return found


EMPTY = np.uint32(0xFFFFFFFF)
"""What every slot of the signature of an empty set holds."""


def signatures(sets: Sets, num_perm: int, seed: int = 1) -> np.ndarray:
    """MinHash signatures of uint32 sets.

    Args:
        sets: n sets of uint32 hashes.
        num_perm: Slots in a signature.
        seed: Of the permutation table; signatures of different seeds can't be compared.

    Returns:
        uint32, shape (n, num_perm).
    """
    assert sets.values.dtype == np.uint32, sets.values.dtype
    a, b = permutations(num_perm, seed)
    out = np.full((len(sets), num_perm), EMPTY, np.uint32)
    _fold(sets.values, sets.offsets, a, b, out)
    return out


def signatures_reference(sets: Sets, num_perm: int, seed: int = 1) -> np.ndarray:
    """What `signatures` computes, in numpy, one row at a time."""
    a, b = permutations(num_perm, seed)
    out = np.full((len(sets), num_perm), EMPTY, np.uint32)
    for i in range(len(sets)):
        h = sets.row(i).astype(np.uint32)
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        h = h ^ (h >> np.uint32(16))
        if len(h):
            out[i] = (a[:, None] * h[None, :] + b[:, None]).min(axis=1)
    return out


@njit(cache=True)
def _fold(
    values: np.ndarray, offsets: np.ndarray, a: np.ndarray, b: np.ndarray, out: np.ndarray
) -> None:
    for i in range(len(offsets) - 1):
        slots = out[i]
        for p in range(offsets[i], offsets[i + 1]):
            h = values[p]
            h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
            h = np.uint32((h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
            h = np.uint32(h ^ (h >> np.uint32(16)))
            for k in range(len(a)):
                # Numba widens the product to 64 bits; the cast is the mod 2^32.
                slots[k] = min(slots[k], np.uint32(a[k] * h + b[k]))
