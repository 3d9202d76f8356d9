"""GOT-D: rows whose added weight moves the pool fastest towards the target.

Kang et al. 2024, arXiv 2405.02774. The pool is transported to the target; with f the dual potential
on the pool's side, the calibrated gradient of a row is f_i minus the mean of the others', and the
smallest are taken. It ranks as f does. The method looks at one row at a time: near-duplicates have
one gradient and go together, so remove duplicates before. A target far outside the pool is not what
it was made for.

The regularisation is a share of the mean cost. A number in the cost's own units means another thing
with every embedder: the code's 0.1 is small beside the distances of raw hidden states, and on
vectors of unit length it blurs the plan until rows are ranked by their mean distance to the target.
`mean_cost_correlation` in the facts says how near to that a run came (1 is there).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from siftline.kernels.draws import uniforms
from siftline.kernels.vectors.blocks import block_rows
from siftline.kernels.vectors.sinkhorn import Cost, mean_costs, sinkhorn, soft_transform
from siftline.selectors.method import Ranked, Ranking, amounts_of, both, by_value
from siftline.selectors.spending import Budget, spend


@dataclass(frozen=True)
class GotD(Ranked):
    """Calibrated gradients of optimal transport; memory is the embeddings and a few blocks.

    A sweep compares all pool rows with all target rows; there are often tens of sweeps.

    Attributes:
        cost: Of moving a row: "squared" Euclidean (as the released code's library), "euclidean" or
            "cosine". Texts should be of one length and vectors of one scale.
        epsilon: Regularisation, as a share of the mean cost between the pool's and the target's
            rows (the released code: 0.1 in units of the cost).
        tolerance: Mass in the wrong place to stop at. The code's 0.1 leaves ranks near the cut
            unstable; facts say what was reached.
        max_iterations: Sweeps at most (the code: 2000).
        momentum: Over-relaxation (the code: 1.3).
        solve_rows: Solve on at most so many pool rows drawn by hash, and extend the potential to
            the others; None solves on all, as the paper does.
        away: True takes the largest gradients: away from a target of what is unwanted.
        seed: Seed of the draw of `solve_rows`.
    """

    cost: Cost = "squared"
    epsilon: float = 0.02
    tolerance: float = 0.01
    max_iterations: int = 2000
    momentum: float = 1.3
    solve_rows: int | None = None
    away: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.cost not in ("squared", "euclidean", "cosine"):
            raise ValueError(f"cost is {self.cost!r}: use 'squared', 'euclidean' or 'cosine'")
        for name in ("epsilon", "tolerance", "max_iterations"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        if not 1 <= self.momentum < 2:
            raise ValueError(f"momentum is {self.momentum}: give 1 (none) to below 2")
        if self.solve_rows is not None and self.solve_rows < 1:
            raise ValueError(f"solve_rows is {self.solve_rows}: give 1 or more, or null for all")

    def columns(self) -> dict[str, Any]:
        return {"embedding": pl.Array}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        x, y = both(pool, target)
        y = y.astype(np.float32)
        solved = x
        if self.solve_rows is not None and self.solve_rows < len(x):
            u = uniforms(self.seed, "got_d", pool["id"].to_list())
            solved = x[np.sort(by_value(-u)[: self.solve_rows])]
        means = mean_costs(x, y, self.cost)
        # Where all rows are in one place every plan is as good.
        epsilon = self.epsilon * (float(means.mean()) or 1.0)
        duals = sinkhorn(
            solved,
            y,
            cost=self.cost,
            epsilon=epsilon,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            momentum=self.momentum,
        )
        f = duals.f
        if solved is not x:
            f = soft_transform(x, y, duals.g, cost=self.cost, epsilon=epsilon)
        gradients = calibrated(f)
        order = by_value(gradients if self.away else -gradients)
        facts = {
            "target_rows": len(y),
            "solved_rows": len(solved),
            "mean_cost": float(means.mean()),
            "epsilon": epsilon,
            "mean_cost_correlation": _correlation(f, means),
            "transport": duals.value,
            "converged": duals.converged,
            "error": duals.error,
            "iterations": duals.iterations,
            "block_rows": block_rows(len(y)),
        }
        spent = spend(order, amounts_of(pool, budget), budget)
        return Ranking(order, spent, gradients, "above_cut", facts=facts)


def _correlation(f: np.ndarray, means: np.ndarray) -> float | None:
    """Spearman's rank correlation of two columns, None where one of them is level."""
    ours, theirs = (pl.Series(part).rank("average").to_numpy() for part in (f, means))
    if ours.std() == 0 or theirs.std() == 0:
        return None
    return round(float(np.corrcoef(ours, theirs)[0, 1]), 4)


def calibrated(f: np.ndarray) -> np.ndarray:
    """Each potential minus the mean of the others, float64 (n,): 0 where there is one row."""
    if len(f) < 2:
        return np.zeros(len(f))
    gradients: np.ndarray = f - (f.sum() - f) / (len(f) - 1)
    return gradients
