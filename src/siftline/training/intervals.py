"""Confidence intervals of accuracies: one run, a paired difference, and several seeds.

Three questions, three intervals. `wilson` says what one run's accuracy is worth given how few
questions there are. `bootstrap_mean` does the same for any value per row, and, fed differences, for
two models on the same questions. `crossed_interval` is for several training seeds on one test set:
both the seeds and the questions are samples, so both variances count. With three seeds a bootstrap
over seeds has ten distinct resamples and covers far too little, which is why that one is a t
interval. All of them are two-sided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from siftline.kernels.draws import uniforms

_POISSON_TABLE = np.cumsum(np.exp(-1.0) / np.cumprod(np.r_[1.0, np.arange(1, 21)]))
"""Cumulative Poisson(1) probabilities of 0..20; the tail beyond has mass 2e-20."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided confidence interval."""

    estimate: float
    low: float
    high: float


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: it must lie between 0 and 1, e.g. 0.95")


def wilson(correct: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927), without continuity correction.

    Unlike the plain normal interval it stays inside [0, 1] and has width at 0 and n correct.

    Args:
        correct: Successes, 0 to n.
        n: Trials, at least 1.
        confidence: Coverage.

    Raises:
        ValueError: if n is 0, or correct lies outside 0..n.
    """
    _check_confidence(confidence)
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n}: need at least one trial and 0 <= correct <= n")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    share = correct / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At the ends the exact bound is 0 or 1; rounding would leave something like 1e-17.
    low = 0.0 if correct == 0 else float(centre - half)
    high = 1.0 if correct == n else float(centre + half)
    return Interval(share, low, high)


def poisson_weights(seed: int, stage: str, ids: Sequence[str], index: int) -> np.ndarray:
    """Poisson(1) weights of one bootstrap resample, a draw of its own for each id; shape (n,)."""
    u = uniforms(seed, stage, ids, index)
    return np.searchsorted(_POISSON_TABLE, u, side="right").astype(np.float64)


def bootstrap_mean(
    ids: Sequence[str],
    values: np.ndarray,
    *,
    seed: int,
    stage: str = "bootstrap",
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap of a mean, with a Poisson(1) weight for each row and resample.

    Poisson weights (Chamandy et al. 2012) stand in for the multinomial ones because each is a draw
    of its own: the result does not depend on row order, and two models measured on the same ids
    are resampled alike. About 1 us a weight.

    Args:
        ids: n distinct ids.
        values: One number per id, shape (n,).
        seed: Seed of the draws.
        stage: Name of the draws; two stages resample independently.
        resamples: How many resamples; 1000 puts 25 beyond each 95 % limit.
        confidence: Coverage.

    Raises:
        ValueError: if there are fewer than two rows, an id comes twice, or lengths differ.
    """
    _check_confidence(confidence)
    if len(ids) != len(values) or len(set(ids)) != len(ids):
        raise ValueError(f"{len(ids)} ids for {len(values)} values: give one distinct id a value")
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} rows: a bootstrap needs at least 2")
    order = np.argsort(np.asarray(ids))  # sums of floats depend on their order
    ordered = [ids[i] for i in order]
    column = np.asarray(values, dtype=np.float64)[order]
    means = np.empty(resamples)
    for index in range(resamples):
        weights = poisson_weights(seed, stage, ordered, index)
        total = weights.sum()
        # All weights are 0 with probability exp(-n): such a resample stands at the mean.
        means[index] = weights @ column / total if total else column.mean()
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(column.mean()), float(low), float(high))


def paired_difference(
    ids: Sequence[str],
    first: np.ndarray,
    second: np.ndarray,
    *,
    seed: int,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """Bootstrap interval of mean(first - second) over the same rows; see `bootstrap_mean`."""
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return bootstrap_mean(
        ids, difference, seed=seed, stage="paired", resamples=resamples, confidence=confidence
    )


def crossed_interval(values: np.ndarray, confidence: float = 0.95) -> Interval:
    """Student-t interval of the mean over k seeds by n questions, both taken as samples.

    The variance of the grand mean is s_seed^2 / k + s_question^2 / n, from the spread of the seeds'
    means and of the questions' means; their interaction enters both, so the interval is slightly
    wide, never narrow. Degrees of freedom by Satterthwaite (1946): near k - 1 when the seeds
    decide, near n - 1 when the questions do.

    Args:
        values: One number per seed and question, shape (k, n), both at least 2.
        confidence: Coverage.

    Raises:
        ValueError: if there are fewer than two seeds or two questions.
    """
    from scipy.stats import t

    _check_confidence(confidence)
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError(f"shape {table.shape}: need at least 2 seeds x 2 questions")
    seeds, questions = table.shape
    mean = float(table.mean())
    parts = np.array(
        [
            table.mean(axis=1).var(ddof=1) / seeds,
            table.mean(axis=0).var(ddof=1) / questions,
        ]
    )
    variance = float(parts.sum())
    if variance == 0.0:
        return Interval(mean, mean, mean)
    freedom = variance**2 / float((parts**2 / np.array([seeds - 1, questions - 1])).sum())
    half = float(t.ppf((1 + confidence) / 2, freedom)) * variance**0.5
    return Interval(mean, mean - half, mean + half)
