"""Rows of two texts, a prompt and a response: their band keys, and what of their sets is read.

A band takes half of its slots from the prompt's signature and half from the response's, so that
both have to agree; see `stages.duplicates.decide`. Sets of distinct texts are copied from where
they lie, in memory or in a file, to where they are compared.
"""

from itertools import pairwise

import numpy as np
from numba import njit

from siftline.kernels.lsh import Banding
from siftline.kernels.spill import Stored
from siftline.kernels.texts import ALONE

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
