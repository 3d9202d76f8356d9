"""How far each vector's k-th nearest neighbour is, over all pairs in blocks."""

from collections.abc import Callable

import numpy as np

from siftline.kernels.vectors.blocks import cosine_blocks, unit
from siftline.kernels.vectors.topk import top_lists

QUERIES = 2048
"""Vectors whose neighbours are looked for at once."""


def kth_distances(
    x: np.ndarray, k: int, progress: Callable[[int], None] = lambda rows: None
) -> np.ndarray:
    """Distances of vectors, scaled to unit length, to their k-th nearest neighbour.

    Neighbours are ranked by cosine. A vector is no neighbour of itself, but an equal one is, at
    distance 0. Time: all pairs. Memory: 4 bytes a value beside `x`, and blocks.

    Args:
        x: Vectors, shape (n, d), any float type.
        k: Which neighbour, from 1.
        progress: Called with the number of vectors done.

    Returns:
        Euclidean distances, 0 to 2, float64, shape (n,): sqrt(2 - 2 x cosine). A vector of zeros,
        whose cosines are 0, is 1 away from all that are not.

    Raises:
        ValueError: if there are not more than k vectors.
    """
    if not 1 <= k < len(x):
        raise ValueError(
            f"the neighbour asked for is {k}, and there are {len(x)} vectors: give 1 to "
            f"{len(x) - 1}, or more rows"
        )
    vectors = unit(x)
    found = np.empty(len(x))
    for start in range(0, len(x), QUERIES):
        own = np.arange(start, min(start + QUERIES, len(x)))
        score, block = cosine_blocks(x, x[own])
        rows = top_lists(len(x), len(own), k + 1, block, score).rows
        # Among many equal vectors a row may be missing from its own list: then the last one goes.
        others = rows != own[:, None]
        others[others.all(axis=1), -1] = False
        kth = rows[others].reshape(len(own), k)[:, -1]
        apart = vectors[own].astype(np.float64) - vectors[kth]
        found[own] = np.sqrt(np.einsum("ij,ij->i", apart, apart))
        progress(len(own))
    return found
