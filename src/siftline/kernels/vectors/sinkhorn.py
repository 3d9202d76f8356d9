"""Optimal transport between two clouds of vectors, entropic, in the log domain, in blocks.

The potentials are all that is kept: n + m numbers. The cost matrix is computed block by block in
every sweep, so a million candidates against ten thousand targets take a few hundred megabytes. A
sweep costs one product of the clouds and two exponentials a pair. Both clouds weigh 1 in all,
evenly spread (Cuturi 2013, arXiv 1306.0895; over-relaxation: Thibault et al. 2017, 1711.01851).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from siftline.kernels.vectors.blocks import BITS, block_rows, over_blocks, unit

Cost = Literal["squared", "euclidean", "cosine"]
Costs = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Duals:
    """Dual potentials of a transport problem.

    Attributes:
        f: float64 potential of each row of the first cloud, shape (n,).
        g: float64 potential of each row of the second, shape (m,).
        value: mean(f) + mean(g), the dual objective; towards epsilon 0 it is the cost.
        iterations: Sweeps made.
        error: Mass in the wrong place after the last sweep: the larger L1 distance of a marginal
            to its weights.
        converged: Whether the error fell to the tolerance.
    """

    f: np.ndarray
    g: np.ndarray
    value: float
    iterations: int
    error: float
    converged: bool


def sinkhorn(
    x: np.ndarray,
    y: np.ndarray,
    *,
    cost: Cost = "squared",
    epsilon: float = 0.1,
    tolerance: float = 0.01,
    max_iterations: int = 2000,
    momentum: float = 1.0,
) -> Duals:
    """Solves the entropic problem with even weights.

    Args:
        x: First cloud, shape (n, d), n >= 1.
        y: Second cloud, shape (m, d), m >= 1.
        cost: Squared Euclidean distance, its root, or 1 - cosine.
        epsilon: Regularisation in units of the cost.
        tolerance: Largest error to stop at.
        max_iterations: Sweeps at most.
        momentum: Over-relaxation, 1 (none) to below 2.

    Returns:
        The potentials. `f` is the soft c-transform of `g`, so equal rows have equal potentials.
    """
    costs, rows = cost_blocks(x, y, cost, exact=False)
    n, m = len(x), len(y)
    f, g = np.zeros(n), np.zeros(m)
    error, sweeps = np.inf, 0
    while error > tolerance and sweeps < max_iterations:
        sweeps += 1
        top, total, row_error = np.full(m, -np.inf), np.zeros(m), 0.0

        def sweep(
            start: int, stop: int, f: np.ndarray = f, g: np.ndarray = g
        ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
            return _sweep(costs(start, stop), f[start:stop], g, epsilon, momentum)

        for start, stop, (moved, block_top, block_total, wrong) in over_blocks(n, rows, sweep):
            f[start:stop] = moved
            highest = np.maximum(top, block_top)
            total = total * np.exp(top - highest) + block_total * np.exp(block_top - highest)
            top = highest
            row_error += wrong / n
        fresh = -epsilon * (top + np.log(total) - np.log(n))
        error = max(float(np.abs(np.expm1((g - fresh) / epsilon)).mean()), row_error)
        g = g + momentum * (fresh - g)
    f = soft_transform(x, y, g, cost=cost, epsilon=epsilon)
    value = float(f.mean() + g.mean())
    return Duals(f, g, value, sweeps, error, error <= tolerance)


def soft_transform(
    x: np.ndarray, y: np.ndarray, g: np.ndarray, *, cost: Cost, epsilon: float
) -> np.ndarray:
    """Potentials of any rows given those of the other cloud: one pass, shape (n,).

    This also extends a solution to rows that took no part in it.
    """
    costs, rows = cost_blocks(x, y, cost, exact=True)
    out = np.empty(len(x))

    def transform(start: int, stop: int) -> np.ndarray:
        return _row_potentials(costs(start, stop), g, epsilon)

    for start, stop, found in over_blocks(len(x), rows, transform):
        out[start:stop] = found
    return out


def mean_costs(x: np.ndarray, y: np.ndarray, cost: Cost) -> np.ndarray:
    """The mean cost of each row of the first cloud to the second, float64 (n,): one pass."""
    costs, rows = cost_blocks(x, y, cost, exact=True)
    out = np.empty(len(x))

    def mean(start: int, stop: int) -> np.ndarray:
        found: np.ndarray = costs(start, stop).mean(axis=1, dtype=np.float64)
        return found

    for start, stop, found in over_blocks(len(x), rows, mean):
        out[start:stop] = found
    return out


def cost_blocks(x: np.ndarray, y: np.ndarray, cost: Cost, *, exact: bool) -> tuple[Costs, int]:
    """A function that gives the costs of rows start..stop, float32 (b, m), and rows a block.

    Args:
        x: First cloud, shape (n, d), any float type.
        y: Second cloud, shape (m, d).
        cost: See `sinkhorn`.
        exact: Products in float64 on a grid, so that equal rows have equal costs; half the speed.
    """
    rows = block_rows(len(y))
    if cost == "cosine":
        x, y = unit(x), unit(y)
    scale = 1.0
    if exact:
        # A power of two that brings the longest vector to 24 bits; every sum below is exact then.
        longest = max(_longest(x), _longest(y))
        scale = 2.0 ** (BITS - np.ceil(np.log2(longest))) if longest else 1.0
    kind = np.float64 if exact else np.float32

    def prepared(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        part = part.astype(kind)
        part = np.rint(part * scale) if exact else part
        return part, np.einsum("ij,ij->i", part, part)

    turned, y_squares = prepared(y)
    turned = np.ascontiguousarray(turned.T)

    def costs(start: int, stop: int) -> np.ndarray:
        part, squares = prepared(x[start:stop])
        inner = part @ turned
        if cost == "cosine":
            return (1 - inner / kind(scale) ** 2).astype(np.float32)
        inner *= -2
        inner += squares[:, None]
        inner += y_squares
        squared = np.maximum(inner, 0, out=inner) / kind(scale) ** 2
        return (np.sqrt(squared) if cost == "euclidean" else squared).astype(np.float32)

    return costs, rows


def _longest(x: np.ndarray) -> float:
    """Length of the longest row."""
    parts = (x[start : start + 4096].astype(np.float64) for start in range(0, len(x), 4096))
    return max(float(np.sqrt(np.einsum("ij,ij->i", part, part).max())) for part in parts)


def _row_potentials(costs: np.ndarray, g: np.ndarray, epsilon: float) -> np.ndarray:
    """-epsilon log mean_j exp((g_j - c_ij) / epsilon), shape (b,)."""
    z = (g.astype(np.float32) - costs) * np.float32(1 / epsilon)
    top = z.max(axis=1)
    z -= top[:, None]
    total = np.exp(z, out=z).sum(axis=1, dtype=np.float64)
    found: np.ndarray = -epsilon * (top + np.log(total) - np.log(len(g)))
    return found


def _sweep(
    costs: np.ndarray, f: np.ndarray, g: np.ndarray, epsilon: float, momentum: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """One block of a sweep: its new f, the columns' largest exponent and sum, the row error."""
    fresh = _row_potentials(costs, g, epsilon)
    moved = f + momentum * (fresh - f)
    wrong = float(np.abs(np.expm1((moved - fresh) / epsilon)).sum())
    z = (moved.astype(np.float32)[:, None] - costs) * np.float32(1 / epsilon)
    top = z.max(axis=0)
    z -= top
    total = np.exp(z, out=z).sum(axis=0, dtype=np.float64)
    return moved, top.astype(np.float64), total, wrong
