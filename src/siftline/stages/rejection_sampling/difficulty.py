"""Difficulty-aware rejection sampling (DART-Math, arXiv 2407.13690): pass rates, targets, draws.

Pure bookkeeping around a sampler: how many verified answers a prompt should get, and which draws
count (`trials` says which to make). Three faults of the released code are put right: a target of k
collects k, not k + 1; copies of an answer do not count; sampling stops at a cap and says so.

What a trial that ended by its own rule says of its prompt's pass rate.
"""

from collections.abc import Mapping, Sequence
from math import comb, log
from typing import Literal

import numpy as np
import polars as pl

from siftline.stages.rejection_sampling.trials import Rule, Trial

HARDEST = 0.99
"""Quantile of the difficulties that counts as the hardest, wherever targets are set. Below 100
prompts it is the maximum; above, one broken prompt can't make all others look easy."""
PASS_RATES = {
    "prompt_id": pl.String,
    "n_trials": pl.Int64,  # draws made
    "n_correct": pl.Int64,  # of them verified
    "n_distinct": pl.Int64,  # of those with different dedup keys
}
DRAWS = {
    "prompt_id": pl.String,
    "draw": pl.Int64,  # 0, 1, 2 ... within the prompt
    "text": pl.String,
    "answer_key": pl.String,
    "correct": pl.Boolean,
    "dedup_key": pl.String,
}


def tally(draws: pl.DataFrame) -> pl.DataFrame:
    """Counts draws (`DRAWS`) into pass rates (`PASS_RATES`), sorted by prompt id."""
    correct = pl.col("correct").fill_null(False)
    return (
        draws.group_by("prompt_id")
        .agg(
            pl.len().cast(pl.Int64).alias("n_trials"),
            correct.sum().cast(pl.Int64).alias("n_correct"),
            pl.col("dedup_key").filter(correct).n_unique().cast(pl.Int64).alias("n_distinct"),
        )
        .sort("prompt_id")
    )


def difficulty(rates: pl.DataFrame) -> pl.DataFrame:
    """Adds `difficulty` = 1 - n_correct / n_trials to pass rates; null where nothing was drawn."""
    wrong = rates.filter((pl.col("n_correct") > pl.col("n_trials")) | (pl.col("n_correct") < 0))
    if not wrong.is_empty():
        raise ValueError(
            f"{wrong.height} prompts have more correct draws than trials, first "
            f"{wrong['prompt_id'][0]}: count each draw once"
        )
    share = pl.col("n_correct") / pl.col("n_trials")
    drawn = pl.when(pl.col("n_trials") > 0).then(1.0 - share)
    return rates.with_columns(drawn.cast(pl.Float64).alias("difficulty"))


def uniform(n: int, k: int) -> np.ndarray:
    """DART-Math Uniform: every prompt gets the same target (the paper: k = 40).

    Args:
        n: Prompts.
        k: Verified answers per prompt, at least 1.

    Returns:
        int64 targets, shape (n,).
    """
    if k < 1:
        raise ValueError(f"a target of {k} answers per prompt: give 1 or more")
    return np.full(n, k, dtype=np.int64)


def prop2diff(
    difficulties: np.ndarray, k: int, *, quantile: float = HARDEST, include_unsolved: bool = False
) -> np.ndarray:
    """DART-Math Prop2Diff: targets in proportion to difficulty, rounded up, at least 1.

    k_i = max(1, ceil(k d_i / d_max)), and at most k. One broken prompt with d = 1 would set d_max
    for all, so d_max is taken over prompts solved at least once, at a quantile (pools below 100
    prompts keep their maximum).

    Args:
        difficulties: Fail rates in [0, 1], shape (n,); NaN, not measured, gets the least target.
        k: Target of the hardest (the paper: 192).
        quantile: Quantile of the difficulties that counts as the maximum.
        include_unsolved: Let prompts with d = 1 set the maximum, as the formula reads.

    Returns:
        int64 targets, shape (n,).

    Raises:
        ValueError: if k < 1, the quantile is not in (0, 1] or a difficulty is outside [0, 1].
    """
    d = np.asarray(difficulties, dtype=np.float64)
    if np.any((d < 0) | (d > 1)):
        raise ValueError(f"difficulties reach from {np.nanmin(d)} to {np.nanmax(d)}: give 0 to 1")
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}: give a number above 0, at most 1")
    least = np.minimum(uniform(len(d), k), 1)
    counted = d[~np.isnan(d) & ((d < 1) | include_unsolved)]
    # The value at the quantile, never between two, so small pools keep their maximum.
    top = float(np.quantile(counted, quantile, method="higher")) if len(counted) else 1.0
    if top == 0.0:  # every solved prompt is always solved; only unsolved ones are hard
        return np.where(d == 1.0, k, least).astype(np.int64)
    # Rounded first: 192 * 0.25 / 0.96 must not become 51 by float noise.
    scaled = np.ceil(np.round(k * np.minimum(np.nan_to_num(d) / top, 1.0), 9))
    return np.maximum(least, scaled.astype(np.int64))


def accept(draws: pl.DataFrame, targets: pl.DataFrame) -> pl.DataFrame:
    """Takes the first k distinct verified draws of each prompt, in draw order.

    What it takes depends on the draws only, not on when or in which batch they came back.

    Args:
        draws: Draws (`DRAWS`), in any order.
        targets: `prompt_id`, `target` (k); every prompt drawn for must be there.

    Returns:
        `prompt_id`, `draw`, `accepted`, `reason` ("incorrect", "duplicate", "over_target" or
        null), `matched_draw` (the earlier draw a duplicate repeats, else null) and `rank` (1..k of
        the accepted); sorted by prompt id and draw.

    Raises:
        ValueError: if a draw is given twice, a correct one has no dedup key, or a prompt has no
            target.
    """
    table = draws.select("prompt_id", "draw", "correct", "dedup_key").sort("prompt_id", "draw")
    table = table.join(targets, on="prompt_id", how="left", validate="m:1", maintain_order="left")
    correct = pl.col("correct").fill_null(False)
    _refuse(table, table.select("prompt_id", "draw").is_duplicated(), "are given twice")
    _refuse(table, table["target"].is_null(), "have no target")
    _refuse(table, table.select(correct & pl.col("dedup_key").is_null()), "have no dedup key")
    earliest = pl.col("draw").filter(correct).min().over("prompt_id", "dedup_key")
    first = correct & (pl.col("draw") == earliest)
    table = table.with_columns(
        earliest.alias("earliest"),
        first.alias("first"),
        first.cum_sum().over("prompt_id").cast(pl.Int64).alias("rank"),
    )
    taken = pl.col("first") & (pl.col("rank") <= pl.col("target"))
    duplicate = correct & ~pl.col("first")
    reason = (
        pl.when(~correct)
        .then(pl.lit("incorrect"))
        .when(duplicate)
        .then(pl.lit("duplicate"))
        .when(~taken)
        .then(pl.lit("over_target"))
    )
    return table.select(
        "prompt_id",
        "draw",
        taken.alias("accepted"),
        reason.alias("reason"),
        pl.when(duplicate).then(pl.col("earliest")).alias("matched_draw"),
        pl.when(taken).then(pl.col("rank")).alias("rank"),
    )


def targets_for(
    rates: pl.DataFrame, rule: Literal["uniform", "prop2diff"], k: int, quantile: float = HARDEST
) -> pl.DataFrame:
    """Targets (`prompt_id`, `difficulty`, `target`) for prompts with measured pass rates."""
    known = difficulty(rates)
    d = known["difficulty"].to_numpy()
    target = uniform(len(d), k) if rule == "uniform" else prop2diff(d, k, quantile=quantile)
    return known.select("prompt_id", "difficulty", pl.Series("target", target, dtype=pl.Int64))


def targets_of(
    rule: Literal["uniform", "prop2diff", "scores"],
    difficulties: np.ndarray,
    k: int,
    quantile: float,
    aimed: pl.Series,
) -> np.ndarray:
    """Answers that each prompt should get in the end: what was drawn for, else the rule's.

    Args:
        rule: For prompts that nothing was drawn for; 1 under "scores".
        difficulties: Fail rates in [0, 1], NaN where not measured, shape (n,).
        k: Most answers of a prompt.
        quantile: Of the difficulties that counts as the hardest.
        aimed: Target that was drawn for, null where nothing was, shape (n,). At least 1 is given: a
            prompt keeps its own best answer whatever was drawn.

    Returns:
        int64 targets, shape (n,).

    Raises:
        ValueError: if the rule goes by difficulty, and none was measured and nothing drawn.
    """
    drawn, n = aimed.is_not_null().to_numpy(), len(difficulties)
    if rule != "prop2diff":
        target = uniform(n, k if rule == "uniform" else 1)
    elif n and np.isnan(difficulties).all() and not drawn.any():
        raise ValueError("no difficulty was measured: sample first, or set targets: uniform")
    else:
        target = prop2diff(difficulties, k, quantile=quantile)
    return np.where(drawn, np.clip(aimed.fill_null(1).to_numpy(), 1, k), target)


def _refuse(table: pl.DataFrame, mask: pl.Series | pl.DataFrame, fault: str) -> None:
    """Raises ValueError when a mask over the draws marks any."""
    marked = table.filter(mask.to_series() if isinstance(mask, pl.DataFrame) else mask)
    if not marked.is_empty():
        raise ValueError(
            f"{marked.height} draws {fault}, first draw {marked['draw'][0]} of "
            f"{marked['prompt_id'][0]}: mend the sample table"
        )


def level_of(difficulties: Sequence[float] | np.ndarray, levels: int) -> np.ndarray:
    """Difficulty level 1..levels by equal steps of the fail rate; 0 where it is not measured.

    Args:
        difficulties: Fail rates in [0, 1], NaN where not measured, shape (n,).
        levels: How many; 5 as in MATH.

    Returns:
        int32 levels, shape (n,).
    """
    d = np.asarray(difficulties, dtype=np.float64)
    step = np.minimum(np.floor(np.nan_to_num(d) * levels + 1e-9), levels - 1) + 1
    return np.where(np.isnan(d), 0, step).astype(np.int32)


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
