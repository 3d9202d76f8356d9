"""Exact Jaccard similarity of sets in compressed rows, and a bounded test against a threshold.

Locality-sensitive hashing proposes; this decides. Both sides of a merge are sorted hashes, so a
dissimilar pair shows early: once more elements are unmatched than the threshold allows, the merge
stops, which rejects a typical false candidate after a fraction of its length without ever being
wrong. Two empty sets are equal (1.0).
"""

import numpy as np
from numba import njit

from siftline.kernels.sets.shingles import Sets


def jaccard_pairs(sets: Sets, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Jaccard similarity of the pairs (left[k], right[k]).

    Args:
        sets: n sets.
        left: Positions, shape (m,).
        right: Positions, shape (m,).

    Returns:
        float64, shape (m,).
    """
    return _pairs(sets.values, sets.offsets, left.astype(np.int64), right.astype(np.int64))


def jaccard_reference(left: set[int], right: set[int]) -> float:
    """Jaccard similarity of two Python sets."""
    return len(left & right) / len(left | right) if left or right else 1.0


@njit(cache=True)
def required_overlap(a: int, b: int, threshold: float) -> int:
    """Smallest intersection of sets of sizes a and b whose Jaccard similarity is >= threshold."""
    need = int(np.ceil(threshold * (a + b) / (1.0 + threshold)))
    # The quotient is rounded; the division that reports the value has the last word.
    while need > 0 and (need - 1) / (a + b - need + 1) >= threshold:
        need -= 1
    while need <= min(a, b) and need / max(a + b - need, 1) < threshold:
        need += 1
    return need


@njit(cache=True)
def overlap(values: np.ndarray, a: int, a_stop: int, b: int, b_stop: int, need: int) -> int:
    """Size of the intersection of values[a:a_stop] and values[b:b_stop]; -1 if under `need`."""
    same = 0
    while a < a_stop and b < b_stop:
        if same + min(a_stop - a, b_stop - b) < need:
            return -1
        x, y = values[a], values[b]
        if x == y:
            same += 1
            a += 1
            b += 1
        elif x < y:
            a += 1
        else:
            b += 1
    return same if same >= need else -1


@njit(cache=True)
def similar(values: np.ndarray, offsets: np.ndarray, i: int, j: int, threshold: float) -> float:
    """Jaccard similarity of sets i and j where it is at least `threshold`, else -1."""
    if i == j:
        return 1.0
    a, b = offsets[i + 1] - offsets[i], offsets[j + 1] - offsets[j]
    if a == 0 and b == 0:
        return 1.0
    need = required_overlap(a, b, threshold)
    if need > min(a, b):
        return -1.0
    same = overlap(values, offsets[i], offsets[i + 1], offsets[j], offsets[j + 1], need)
    return same / (a + b - same) if same >= 0 else -1.0


@njit(cache=True)
def _pairs(
    values: np.ndarray, offsets: np.ndarray, left: np.ndarray, right: np.ndarray
) -> np.ndarray:
    out = np.empty(len(left), np.float64)
    for k in range(len(left)):
        out[k] = similar(values, offsets, left[k], right[k], 0.0)
    return out
