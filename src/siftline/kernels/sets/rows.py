"""From rows of text in Arrow's layout to signatures, band keys and shingle sets.

The bytes of all rows and their offsets go in, arrays come out; between them a row lives in buffers
of its own. Signatures are datasketch 2.0's `affine32` (see `shingles`), bit for bit, and are only
written where they are asked for: what deduplication keeps of a row is one 64-bit key a band.

The functions release Python's lock, so threads run them side by side over ranges of rows. They
allocate nothing, so that they can be kept compiled (`machine`); `texts` is where they are called.
"""

import numpy as np
from numba import njit

from siftline.kernels.sets.shingles import EMPTY, write_distinct
from siftline.kernels.text.bits import lowest8, lowest32
from siftline.kernels.text.folding import fold
from siftline.kernels.text.textgrams import character_units, text_hash, windows
from siftline.kernels.text.texts import ALONE, Buffers, Held, Rows, Shingling, Texts
from siftline.kernels.text.tokens import word_units, write_words

_G = np.uint64(0x9E3779B97F4A7C15)
_F = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(29)
_HALF = np.uint64(32)


@njit(cache=True, nogil=True)
def summarise(
    texts: Texts,
    start: int,
    stop: int,
    shingling: Shingling,
    a: np.ndarray,
    b: np.ndarray,
    rows: int,
    out: Rows,
    at: int,
    held: Held,
    free: int,
    end: int,
    buffers: Buffers,
    slots: np.ndarray,
) -> None:
    """Writes keys, hashes and counts of the rows start to stop, and keeps their shingles.

    Args:
        texts: Rows.
        start: First of them.
        stop: Their end.
        shingling: How they are cut.
        a: Multipliers, uint32, shape (slots,) (`texts.permutations`).
        b: Offsets, uint32, shape (slots,).
        rows: Slots in a band.
        out: Where the results go.
        at: Place of row `start` in `out`.
        held: Where shingles are kept, if at all.
        free: Where room for these rows starts in it.
        end: Where it ends.
        buffers: Room for the longest row.
        slots: Room for a signature, uint32, shape (slots,).
    """
    holds = len(held.starts) > 0
    for i in range(start, stop):
        k = at + i - start
        if texts.null[i]:
            out.keys[:, k] = ALONE
            out.counts[k] = -1
            out.hashes[k] = 0
            if holds:
                held.starts[i] = -1
            continue
        begin, stop_at = texts.offsets[i], texts.offsets[i + 1]
        out.hashes[k] = text_hash(texts.data, begin, stop_at)
        units = _units(texts.data, begin, stop_at, shingling, buffers)
        count = max(units - shingling.n + 1, min(units, 1))
        keeps = holds and free + count <= end
        shingles = held.values[free:] if keeps else buffers.shingles
        windows(buffers.units, units, shingling.n, shingles)
        out.counts[k] = count
        if holds:
            held.starts[i] = free if keeps else -1
        if keeps:
            free += count
        if count == 0:
            # Nothing to sign: such a text can only be the same as another.
            out.keys[:, k] = max(out.hashes[k], np.uint64(1))
            continue
        _sign(shingles, count, a, b, slots, buffers.mixed)
        for band in range(len(out.keys)):
            out.keys[band, k] = _key(slots, band * rows, rows, band)


@njit(cache=True, nogil=True)
def sign(
    texts: Texts,
    shingling: Shingling,
    a: np.ndarray,
    b: np.ndarray,
    out: np.ndarray,
    buffers: Buffers,
) -> None:
    """Writes the signature of every row to `out`, uint32, shape (n, slots)."""
    for i in range(len(texts.offsets) - 1):
        count = 0
        if not texts.null[i]:
            begin, end = texts.offsets[i], texts.offsets[i + 1]
            count = _shingle(texts.data, begin, end, shingling, buffers)
        _sign(buffers.shingles, count, a, b, out[i], buffers.mixed)


@njit(cache=True, nogil=True)
def collect(
    texts: Texts,
    wanted: np.ndarray,
    shingling: Shingling,
    values: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
    held: Held,
    counts: np.ndarray,
    buffers: Buffers,
) -> None:
    """Writes the sorted distinct shingle hashes of some rows; those that were not kept anew.

    Args:
        texts: Rows.
        wanted: Which of them, int64, shape (m,).
        shingling: How they are cut.
        values: uint32, where the hashes go.
        starts: int64, shape (m,): where those of each row go; room for all its shingles follows.
        sizes: int32, shape (m,): written, how many distinct ones there are.
        held: Shingles of the rows that are kept, if any.
        counts: int32, how many each row has; read where they are kept.
        buffers: Room for the longest of them.
    """
    ends = buffers.ends
    for k in range(len(wanted)):
        i = wanted[k]
        if len(held.starts) > 0 and held.starts[i] >= 0:
            kept = held.values[held.starts[i] :]
            sizes[k] = write_distinct(kept, counts[i], values, starts[k], ends)
            continue
        begin, end = texts.offsets[i], texts.offsets[i + 1]
        count = _shingle(texts.data, begin, end, shingling, buffers)
        sizes[k] = write_distinct(buffers.shingles, count, values, starts[k], ends)


@njit(cache=True, nogil=True)
def _shingle(data: np.ndarray, begin: int, end: int, how: Shingling, buffers: Buffers) -> int:
    """Writes the shingles of one text to `buffers.shingles`; returns how many there are."""
    count = _units(data, begin, end, how, buffers)
    return windows(buffers.units, count, how.n, buffers.shingles)


@njit(cache=True, nogil=True)
def _units(data: np.ndarray, begin: int, end: int, how: Shingling, buffers: Buffers) -> int:
    """Writes the units of one text to `buffers.units`; returns how many there are."""
    stop = fold(data, begin, end, buffers.folded, how.tables, buffers.points)
    if how.characters:
        written = write_words(buffers.folded, stop, buffers.words, 0)
        return character_units(buffers.words, 0, written, buffers.units)
    return word_units(buffers.folded, stop, buffers.units)


@njit(cache=True, nogil=True)
def _sign(
    shingles: np.ndarray,
    count: int,
    a: np.ndarray,
    b: np.ndarray,
    slots: np.ndarray,
    mixed: np.ndarray,
) -> None:
    """The signature of shingles[:count]; `mixed` is room for as many."""
    for p in range(count):
        h = shingles[p]
        h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
        h = np.uint32((h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
        mixed[p] = h ^ (h >> np.uint32(16))
    least(mixed, count, a, b, slots)


@njit(cache=True, nogil=True)
def least(mixed: np.ndarray, count: int, a: np.ndarray, b: np.ndarray, slots: np.ndarray) -> None:
    """Writes the least a * h + b mod 2^32 over mixed[:count] to each slot, uint32."""
    k = 0
    while k + 32 <= len(a):
        lowest32(mixed, count, a, b, slots, k)
        k += 32
    while k + 8 <= len(a):
        lowest8(mixed, count, a, b, slots, k)
        k += 8
    slots[k:] = EMPTY
    for rest in range(k, len(a)):
        for p in range(count):
            # Numba widens the product to 64 bits; the cast is the mod 2^32.
            slots[rest] = min(slots[rest], np.uint32(a[rest] * mixed[p] + b[rest]))


@njit(cache=True, nogil=True)
def _key(slots: np.ndarray, first: int, rows: int, band: int) -> np.uint64:
    h = np.uint64(band + 1) * _F
    for slot in range(first, first + rows):
        h = (h ^ np.uint64(slots[slot])) * _G
        h ^= h >> _SHIFT
    h *= _F
    return max(h ^ (h >> _HALF), np.uint64(1))
