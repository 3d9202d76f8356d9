"""A linear rule of quality: rows of the lowest predicted loss (InstructMining, arXiv 2307.06290).

The log-loss of a model tuned on a set is taken to be linear in the means of some indicators over
that set; a row is scored as if it were a set of its own, which is a step from groups to members
that nothing proves. The published coefficients belong to Llama-2-7B, one reward model and UniEval:
fit your own with `fit_rule` on runs of your own. Published: random 10,000 rows did better (58.74)
than the rule's (58.65) on the OpenLLM average.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from siftline.config import nearest
from siftline.kernels.vectors.least_squares import Fit, least_squares
from siftline.selectors.method import Ranked, Ranking, amounts_of, by_value
from siftline.selectors.spending import Budget, spend

PUBLISHED_INTERCEPT = 0.0274
PUBLISHED = {
    "reward": -0.0078,
    "understandability": 0.4421,
    "naturalness": -0.3212,
    "coherence": -0.1520,
}
"""InstructMining, third version, as one third-party note gives it (R squared 0.522)."""
CLOSE = 1.05
"""Neighbouring sizes closer than this ratio are one size to the search."""


@dataclass(frozen=True)
class LinearRule(Ranked):
    """Rows by a weighted sum of columns, the smallest first.

    Memory: about 270 bytes a row with four columns (measured as in `baselines`).

    Attributes:
        coefficients: Weight of each column; the published ones by default.
        intercept: Added to the sum; it moves values, not ranks.
    """

    coefficients: dict[str, float] = field(default_factory=lambda: dict(PUBLISHED))
    intercept: float = PUBLISHED_INTERCEPT

    def __post_init__(self) -> None:
        if not self.coefficients:
            raise ValueError("coefficients are empty: name one column or more")

    def columns(self) -> dict[str, Any]:
        return dict.fromkeys(self.coefficients, pl.Float64)

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        values = np.full(pool.height, self.intercept)
        for name in sorted(self.coefficients):
            values = values + self.coefficients[name] * pool[name].to_numpy()
        order = by_value(-values)
        return Ranking(order, spend(order, amounts_of(pool, budget), budget), values, "above_cut")


def fit_rule(
    runs: pl.DataFrame, indicators: Sequence[str], loss: str = "loss"
) -> tuple[LinearRule, pl.DataFrame, Fit]:
    """Fits a rule to runs: one line for every set a model was tuned on.

    Args:
        runs: Means of the indicators over the set, and the loss reached, above 0.
        indicators: Columns of the means.
        loss: Column of the loss.

    Returns:
        The rule in the indicators' own units, a table (indicator, coefficient for one standard
        deviation, low, high, inflation), and the fit.

    Raises:
        ValueError: as `least_squares`; for an indicator that is missing, named twice or the same in
            all runs; or for a loss that is not above 0.
    """
    for place, name in enumerate(indicators):
        if name not in runs.columns:
            raise ValueError(f"the runs have no column {name!r}: {nearest(name, runs.columns)}")
        if name in indicators[:place]:
            raise ValueError(f"indicator {name!r} is named twice: name it once")
        if runs.height > 1 and _flat(runs[name]):
            raise ValueError(f"{name} is the same in all {runs.height} runs: leave it out")
    if loss not in runs.columns:
        raise ValueError(f"the runs have no column {loss!r}: {nearest(loss, runs.columns)}")
    losses = runs[loss].to_numpy().astype(np.float64)
    if not (losses > 0).all():
        raise ValueError(f"{int((~(losses > 0)).sum())} runs have no {loss} above 0")
    fit = least_squares(runs.select(indicators).to_numpy().astype(np.float64), np.log(losses))
    slopes = fit.coefficients / fit.scales
    rule = LinearRule(
        dict(zip(indicators, slopes.tolist(), strict=True)),
        float(fit.intercept - slopes @ fit.means),
    )
    table = pl.DataFrame(
        {
            "indicator": list(indicators),
            "coefficient": fit.coefficients,
            "low": fit.low,
            "high": fit.high,
            "inflation": fit.inflation,
        }
    )
    return rule, table, fit


def _flat(column: pl.Series) -> bool:
    """Whether all values are one finite number."""
    numbers = column.cast(pl.Float64, strict=False)
    return numbers.n_unique() == 1 and bool(numbers.is_finite().all())


def next_size(known: Mapping[int, float], low: int, high: int, grid: int = 9) -> int | None:
    """The next subset size to try, or None when the search is done.

    The loss as a function of the size has more than one dip (which is why the authors search), so
    sizes spread evenly in ratio come first; then the gaps beside the best two dips are halved until
    they are within 5 %. Being a function of what is known alone, a search can stop and go on.

    Args:
        known: Loss by size for the trials so far; mean over seeds, or noise is what is searched.
        low: Smallest size.
        high: Largest size.
        grid: Sizes tried first.

    Raises:
        ValueError: if the bounds are not 1 <= low < high, or grid is below 3.
    """
    if not 1 <= low < high or grid < 3:
        raise ValueError(f"low {low}, high {high}, grid {grid}: give 1 <= low < high, grid 3 up")
    first = sorted({round(n) for n in np.geomspace(low, high, grid).tolist()})
    waiting = [n for n in first if n not in known]
    if waiting:
        return waiting[0]
    sizes = sorted(n for n in known if low <= n <= high)
    losses = [known[n] for n in sizes]
    edge = [float("inf"), *losses, float("inf")]
    dips = [i for i in range(len(sizes)) if edge[i + 1] <= edge[i] and edge[i + 1] <= edge[i + 2]]
    for i in sorted(dips, key=lambda i: (losses[i], sizes[i]))[:2]:
        gaps = []
        for a, b in ((i - 1, i), (i, i + 1)):
            if a >= 0 and b < len(sizes):
                middle = round(float(np.sqrt(sizes[a] * sizes[b])))
                if sizes[b] / sizes[a] > CLOSE and middle not in known:
                    gaps.append((-sizes[b] / sizes[a], middle))
        if gaps:
            return min(gaps)[1]
    return None
