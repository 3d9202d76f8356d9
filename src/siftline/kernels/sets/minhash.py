"""MinHash signatures over compressed rows, bit-equal to datasketch 2.0's `affine32` scheme.

datasketch builds one Python object a document and calls Python once a token. The same arithmetic in
one compiled loop over prehashed tokens gives the same signatures many times faster, and the library
stays the reference it is tested against. Scheme (datasketch 2.0, ekzhu/datasketch#323): tokens pass
the MurmurHash3 finaliser, slot k holds the smallest a[k] * h + b[k] mod 2^32 with a odd.
"""

import numpy as np
from numba import njit

from siftline.kernels.sets.shingles import Sets
from siftline.kernels.text.texts import permutations

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
