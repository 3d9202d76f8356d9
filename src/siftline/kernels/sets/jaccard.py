"""Exact Jaccard similarity of sets in compressed rows, and a bounded test against a threshold.

Locality-sensitive hashing proposes; this decides. Both sides of a merge are sorted hashes, so a
dissimilar pair shows early: once more elements are unmatched than the threshold allows, the merge
stops, which rejects a typical false candidate after a fraction of its length without ever being
wrong. Two empty sets are equal (1.0).

Chains of rows in keep order, one a group, as arrays that compiled code appends to.
"""

from typing import NamedTuple

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


class Chains(NamedTuple):
    """Chain g starts at link head[g] and ends at tail[g]; -1 is none.

    Attributes:
        head: int32, shape (groups,).
        tail: int32, shape (groups,).
        after: int32, shape (links,): after[c] follows link c.
        owner: int32, shape (links,): the row that link c stands for.
    """

    head: np.ndarray
    tail: np.ndarray
    after: np.ndarray
    owner: np.ndarray


@njit(cache=True, nogil=True)
def no_chains(groups: int, links: int) -> Chains:
    """Empty chains of some groups, with room for some links."""
    return Chains(
        np.full(groups, -1, np.int32),
        np.full(groups, -1, np.int32),
        np.full(links, -1, np.int32),
        np.empty(links, np.int32),
    )


@njit(cache=True, nogil=True)
def append(chains: Chains, group: int, link: int, row: int) -> None:
    """Ends the chain of a group with a link that stands for a row."""
    chains.owner[link] = row
    if chains.head[group] < 0:
        chains.head[group] = link
    else:
        chains.after[chains.tail[group]] = link
    chains.tail[group] = link
