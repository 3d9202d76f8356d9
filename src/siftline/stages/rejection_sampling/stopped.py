"""What a trial that ended by its own rule says of its prompt's pass rate.

Successes over draws is a biased rate where the draws decided when they ended: too high where the
last one met a target, too low where failures made the trial hopeless. The mean of a draw that is
always made, given only where the trial ended, has no bias whatever the stopping rule (Girshick,
Mosteller & Savage 1946); for a target alone it is Haldane's (k - 1) / (n - 1).
"""

from collections.abc import Mapping
from math import comb, log

import numpy as np
import polars as pl

from siftline.stages.rejection_sampling.difficulty import difficulty
from siftline.stages.rejection_sampling.trials import Rule, Trial


def rates_at_the_end(rule: Rule, target: int) -> dict[tuple[int, int], float]:
    """Unbiased rates of new answers by draws and answers at which a trial may end.

    Every order of outcomes that ends there is as likely as any other, so it is the mean, over these
    orders, of the successes among the draws that every trial makes.
    """
    n = max(rule.pilot, 1)
    count = np.arange(max(n, target) + 1)
    ends = np.array([rule.given_up(d, target) if d < target else 0 for d in count.tolist()])
    orders = np.full(len(count), -np.inf)  # logarithms: there are too many of them
    orders[: n + 1] = [log(comb(n, d)) for d in range(n + 1)]
    rate = np.minimum(count / n, 1.0)
    out: dict[tuple[int, int], float] = {}
    while True:
        ended = np.isfinite(orders) & ((count >= target) | (n >= ends) | (n >= rule.cap))
        out |= {(n, int(d)): float(rate[d]) for d in count[ended]}
        orders[ended] = -np.inf
        if not np.isfinite(orders).any():
            return out
        right = np.concatenate([[-np.inf], orders[:-1]])
        both = np.logaddexp(orders, right)
        share = np.exp(right - np.where(np.isfinite(both), both, 0.0))
        rate = (1 - share) * rate + share * np.concatenate([[0.0], rate[:-1]])
        orders, n = both, n + 1


def stopped_difficulty(rates: pl.DataFrame, trials: Mapping[str, Trial]) -> pl.DataFrame:
    """`difficulty` of prompts whose draws stopped by the rule of their trials, corrected for it.

    Of a single success that met a target it leaves nothing, so that one is counted as it is: a
    solved prompt's difficulty is below 1. So are draws that were stopped by their number, as the
    pilot's, or by a limit. Where copies don't count, the rate is corrected by as much as that of
    new answers is.

    Args:
        rates: Columns of `PASS_RATES`, and `status` of the trial.
        trials: By prompt id.

    Returns:
        The same rows with `difficulty` (null where nothing was drawn).
    """
    known: dict[int, dict[tuple[int, int], float]] = {}
    plain = difficulty(rates)
    found = []
    for line in plain.to_dicts():
        value, n, d = line["difficulty"], line["n_trials"], line["n_distinct"]
        trial = trials.get(line["prompt_id"])
        by_rule = line["status"] in ("met", "unsolved", "capped") and d > 0
        if trial is not None and by_rule and n > trial.rule.pilot:
            if trial.target not in known:
                known[trial.target] = rates_at_the_end(trial.rule, trial.target)
            rate = known[trial.target].get((n, d), 0.0)
            if rate > 0:
                value = 1 - min(rate * line["n_correct"] / d, 1.0)
        found.append(value)
    return plain.with_columns(pl.Series("difficulty", found, dtype=pl.Float64))
