"""Banded locality-sensitive hashing of MinHash signatures.

Cut a signature into b bands of r rows. Two sets of Jaccard similarity s agree on one slot with
probability s, on a band with s^r, and so on at least one band with

    recall(s) = 1 - (1 - s^r)^b

(Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, section 3.4). datasketch weighs false
positives against false negatives around the threshold; here the recall just above the threshold is
promised and false positives only cost time, because every candidate is verified. So: the most
selective r whose bands still reach the recall with the slots there are.
"""

import math
from dataclasses import dataclass

import numpy as np

MARGIN = 0.05
RECALL = 0.99

_G = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


@dataclass(frozen=True)
class Banding:
    """How signatures are cut.

    Attributes:
        bands: Number of bands.
        rows: Slots in a band.
        similarity: Where the recall is promised.
        recall: 1 - (1 - similarity^rows)^bands.
    """

    bands: int
    rows: int
    similarity: float
    recall: float

    @property
    def slots(self) -> int:
        """Slots used; a signature needs at least as many."""
        return self.bands * self.rows


def recall(similarity: float, bands: int, rows: int) -> float:
    """Probability that two sets of Jaccard `similarity` share at least one band."""
    hit = similarity**rows
    return 1.0 if hit == 1.0 else -math.expm1(bands * math.log1p(-hit))


def choose_banding(
    similarity: float, num_perm: int, target: float = 0.99, min_rows: int = 1
) -> Banding:
    """The most selective banding whose recall at `similarity` is at least `target`.

    Args:
        similarity: Jaccard similarity in (0, 1].
        num_perm: Slots in a signature.
        target: Recall asked for, in (0, 1).
        min_rows: Smallest band allowed.

    Raises:
        ValueError: if `num_perm` slots can't reach the recall.
    """
    for rows in range(num_perm, min_rows - 1, -1):
        # The most bands the slots allow reach the recall, or none does.
        if recall(similarity, num_perm // rows, rows) >= target:
            bands = next(b for b in range(1, num_perm + 1) if recall(similarity, b, rows) >= target)
            return Banding(bands, rows, similarity, recall(similarity, bands, rows))
    raise ValueError(
        f"num_perm={num_perm} gives less than {target:.0%} recall at similarity "
        f"{similarity:.3f}: raise num_perm or the threshold"
    )


def banding_for(threshold: float, num_perm: int, min_rows: int = 1) -> Banding:
    """The banding that finds 99 % of the pairs MARGIN above `threshold`.

    Where 1 is nearer than two margins the recall is promised from halfway to 1.

    Raises:
        ValueError: if `num_perm` slots can't reach the recall.
    """
    promised = min(threshold + MARGIN, (1.0 + threshold) / 2.0)
    return choose_banding(promised, num_perm, RECALL, min_rows)


def band_keys(signatures: np.ndarray, banding: Banding, guard: np.ndarray) -> np.ndarray:
    """One key a band: hash of the band's number, its slots and what must be equal anyway.

    Args:
        signatures: uint32, shape (n, at least banding.slots).
        banding: How to cut them.
        guard: uint64, shape (n,); rows whose guards differ never share a key.

    Returns:
        uint64, shape (n, bands).
    """
    keys = np.empty((len(signatures), banding.bands), np.uint64)
    for band in range(banding.bands):
        h = _mix(guard.astype(np.uint64) ^ np.uint64(band + 1))
        for slot in range(band * banding.rows, (band + 1) * banding.rows):
            h = _mix(h ^ signatures[:, slot].astype(np.uint64))
        keys[:, band] = h
    return keys


def _mix(h: np.ndarray) -> np.ndarray:
    h = h * _G
    return h ^ (h >> _SHIFT)
