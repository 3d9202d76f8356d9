"""Facility location: rows that leave no row of the pool without a near one.

The diversity step of Superfiltering.D (arXiv 2402.00530) and a common coreset baseline. It sees
coverage alone: outliers are covered too, so gate faults out before.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from siftline.kernels.draws import uniforms
from siftline.kernels.vectors.blocks import cosine_blocks, unit
from siftline.kernels.vectors.facility import Facilities, lazy_greedy, stochastic_greedy
from siftline.selectors.method import Ranked, Ranking, amounts_of, by_value, matrix
from siftline.selectors.spending import Budget, spend_lazily

MAX_PAIRS = 20_000_000_000
"""Rows x covered rows of the stochastic method, which time bounds and not memory."""
MAX_EXACT = 400_000_000
"""Rows x covered rows of the exact method, whose matrix is held: 1.6 GB."""


@dataclass(frozen=True)
class FacilityLocation(Ranked):
    """Greedy facility location with similarity max(0, cosine).

    Memory: the pool's vectors at 4 bytes a value; `exact` also holds the matrix of similarities.

    Attributes:
        cover: Rows to cover, drawn by hash where the pool has more (siftline's choice; the value
            is then that of a sample). All rows of a smaller pool are covered.
        epsilon: Loss of the stochastic method in expectation; each row is looked at about
            ln(1 / epsilon) times (Mirzasoleiman et al. 2015), so 2 by default.
        exact: True is plain greedy, lazily; refused above 400 million pairs.
        seed: Seed of the draws.
    """

    cover: int = 10_000
    epsilon: float = 0.1
    exact: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.cover < 1:
            raise ValueError(f"cover is {self.cover}: give 1 or more")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon is {self.epsilon}: give a number between 0 and 1")

    def columns(self) -> dict[str, Any]:
        return {"embedding": pl.Array}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        ids = pool["id"].to_list()
        self._check(len(ids))
        x = unit(matrix(pool))
        drawn = by_value(-uniforms(self.seed, "facility_cover", ids))[: self.cover]
        covered = x[np.sort(drawn)]
        exact = _similarities(x, covered) if self.exact else None
        found: Facilities | None = None

        def ordered(k: int) -> np.ndarray:
            nonlocal found
            if exact is not None:
                found = lazy_greedy(exact, k)
            else:
                found = stochastic_greedy(x, covered, k, self._turns(ids, k))
            return found.rows

        order, spent = spend_lazily(ordered, amounts_of(pool, budget), budget)
        assert found is not None
        values = np.full(len(ids), np.nan)
        values[found.rows] = found.gains
        facts = {"covered_rows": len(covered), "value": round(float(found.gains.sum()), 6)}
        return Ranking(order, spent, values, "covered_by_others", facts=facts)

    def _turns(self, ids: list[str], k: int) -> np.ndarray:
        """In which of k turns each row is looked at; a hash of its id, so the same in any pool."""
        looks = max(1, round(float(-np.log(self.epsilon))))
        draws = [uniforms(self.seed, "facility_turn", ids, i) for i in range(looks)]
        return np.stack([(u * k).astype(np.int64) for u in draws], axis=1)

    def _check(self, n: int) -> None:
        pairs, limit = n * min(n, self.cover), MAX_EXACT if self.exact else MAX_PAIRS
        if pairs > limit:
            raise ValueError(
                f"{n} rows x {min(n, self.cover)} to cover are over {limit} pairs: set cover lower "
                f"({limit // n}){', or exact to false' if self.exact else ''}"
            )


def _similarities(x: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """The whole matrix of max(0, cosine), float32, shape (n, m)."""
    out = np.empty((len(x), len(covered)), dtype=np.float32)
    cosines, rows = cosine_blocks(x, covered)
    for start in range(0, len(x), rows):
        stop = min(start + rows, len(x))
        out[start:stop] = np.maximum(cosines(start, stop), 0)
    return out
