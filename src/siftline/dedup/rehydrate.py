"""How often to repeat a kept row, from the size of its cluster (FineWeb2's "rehydration").

A text found many times on the web is more often good than one found once, up to a point: beyond
hundreds of copies it is boilerplate. FineWeb2 (Penedo et al. 2025, huggingface/fineweb-2) repeats
rows by a rule of cluster sizes that was fitted per language to the share of rows that its quality
filters remove. `published` is the simple rule it gives; `fitted` makes a rule from one's own rates.
"""

from collections.abc import Sequence

import numpy as np

_FROM = np.array([1, 2, 3, 5, 100, 1000])
_TIMES = np.array([1, 2, 3, 5, 8, 1])
_BOX = 5


def published(sizes: np.ndarray) -> np.ndarray:
    """Repeats by the simple rule: 1:1, 2:2, 3-4:3, 5-99:5, 100-999:8, from 1000 on 1.

    Args:
        sizes: Cluster sizes of kept rows, at least 1, shape (n,).

    Returns:
        int64, shape (n,).
    """
    assert (sizes >= 1).all(), "a kept row counts itself"
    return _TIMES[np.searchsorted(_FROM, sizes, side="right") - 1].astype(np.int64)


def fitted(rates: Sequence[float], overall: float, most: int) -> np.ndarray:
    """Repeats for ascending cluster sizes from how many rows of each size a filter removes.

    The size with the lowest rate is repeated `most` times, sizes at or above the overall rate once,
    and others in proportion; then a mean over five neighbours, except at the two sizes on either
    end, and rounding half to even. Fewer than five sizes are not smoothed. (There the original
    takes a mean over more places than there are, by numpy's "same" mode; that is not repeated.)

    Args:
        rates: Share of rows removed, in [0, 1], for each cluster size.
        overall: Share removed of all rows.
        most: Repeats at the lowest rate, at least 1.

    Returns:
        int64, shape (len(rates),).

    Raises:
        ValueError: if a rate is not in [0, 1], or `most` is below 1.
    """
    rate = np.asarray(rates, np.float64)
    if not ((rate >= 0) & (rate <= 1)).all() or not 0 <= overall <= 1:
        raise ValueError(f"rates={list(rates)} and overall={overall} must lie in [0, 1]")
    if most < 1:
        raise ValueError(f"most={most} must be at least 1")
    lowest = rate.min(initial=overall)
    repeats = np.ones(len(rate))
    below = rate < overall
    repeats[below] += (most - 1) * (rate[below] - overall) / (lowest - overall)
    if len(rate) >= _BOX:
        repeats[2:-2] = np.convolve(repeats, np.full(_BOX, 1 / _BOX), "valid")
    return np.round(repeats).astype(np.int64)
