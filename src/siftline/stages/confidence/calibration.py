"""Parts joined into a probability, how far it can be believed, and on whom a threshold falls.

On rows of dev whose truth is known, a small logistic model learns how the parts go together, so
that a confidence is the probability that an answer is right (Platt 1999). Every number about it is
cross-fitted: a prompt is judged by a model that has not seen it. Prompts are resampled for the
intervals.

Wherever rows are known to be right or wrong, confidence can be held against it: a reliability curve
with its expected calibration error (Naeini et al. 2015; Guo et al. 2017), and the AUROC of the
whole and of each part. The shares kept by group show a gate that only lets the easy rows pass.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl

from siftline.kernels.draws import uniforms
from siftline.stages.confidence.decide import auroc
from siftline.training.intervals import poisson_weights

BINS = 10
LEAST_PROMPTS = 10
"""Prompts with right answers, and with wrong ones, that a probability is learnt from at least."""
FOLDS = 5
RESAMPLES = 200
PENALTY = 1.0
"""Of the squared coefficients of standardised parts: a normal prior of variance 1."""
DECIMALS = 9
"""Digits of a probability that don't depend on the order of floating point sums."""
CHUNK = 4096
SHOWN_GROUPS = 20
"""Groups listed in a stage's facts; the side table has them all."""


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[dict]:
    """Mean confidence and share right in bins of equal width.

    Args:
        confidence: In [0, 1], shape (n,).
        right: Booleans, shape (n,).
        bins: How many; 10 as is usual. A value on an edge belongs to the bin above it, 1 to the
            last.

    Returns:
        One entry per bin: low, high, rows, confidence and right (both null without rows).

    Raises:
        ValueError: if a confidence is not in [0, 1].
    """
    values = np.asarray(confidence, np.float64)
    labels = np.asarray(right, bool)
    if not np.all((values >= 0) & (values <= 1)):
        raise ValueError(f"confidences reach from {values.min()} to {values.max()}: give 0 to 1")
    # Against the edges themselves: 0.3 * 10 is below 3 in some orders of rounding.
    edges = np.arange(bins + 1) / bins
    at = np.minimum(np.searchsorted(edges, values, side="right") - 1, bins - 1)
    lines = []
    for k in range(bins):
        here = at == k
        rows = int(here.sum())
        lines.append(
            {
                "low": float(edges[k]),
                "high": float(edges[k + 1]),
                "rows": rows,
                "confidence": float(values[here].mean()) if rows else None,
                "right": float(labels[here].mean()) if rows else None,
            }
        )
    return lines


def calibration_error(lines: Sequence[dict]) -> float | None:
    """Expected calibration error: mean |confidence - share right| over rows; None without any."""
    rows = sum(line["rows"] for line in lines)
    if not rows:
        return None
    gaps = (
        line["rows"] * abs(line["confidence"] - line["right"]) for line in lines if line["rows"]
    )
    return float(sum(gaps) / rows)


def ranking(scores: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """AUROC with its interval, as facts; null where a class has fewer than two rows.

    Args:
        scores: Shape (n,), NaN where a row has none; those are left out.
        right: Booleans, shape (n,).
    """
    known = ~np.isnan(np.asarray(scores, np.float64))
    values, labels = np.asarray(scores, np.float64)[known], np.asarray(right, bool)[known]
    found: dict[str, Any] = {"rows": len(values), "value": None, "low": None, "high": None}
    if min(int(labels.sum()), int((~labels).sum())) >= 2:
        found |= auroc(values, labels)._asdict()
    return found


class Joint:
    """The probability that an answer is right, from the parts it has.

    One logistic regression with an L2 penalty (scikit-learn) for each set of parts that rows have,
    fitted to the known rows that have them all; so nothing is made up for a missing part. Where too
    few known rows have a set, the largest subset that enough of them have is taken, at last the
    known rows' share of right ones.

    Args:
        known: Columns `prompt_id`, `right` (boolean) and the parts, null where missing; one line
            for each answer whose truth is known, in any order.
        parts: Names of the parts.
        seed: Of the resamples.
        resamples: Resamples of the known rows' prompts that intervals come from.
        least: Prompts of each class that a set of parts needs.
    """

    def __init__(
        self,
        known: pl.DataFrame,
        parts: Sequence[str],
        seed: int,
        resamples: int = RESAMPLES,
        least: int = LEAST_PROMPTS,
    ) -> None:
        self.parts = tuple(parts)
        known = known.select("prompt_id", "right", *(pl.col(p).fill_nan(None) for p in parts))
        self.known = known.sort("prompt_id", "right", *parts)  # sums depend on their order
        self._seed, self._resamples, self._least = seed, resamples, least
        self._models: dict[tuple[str, ...], tuple[tuple[str, ...], np.ndarray]] = {}
        self.reduced = 0
        """Rows judged by fewer parts than they have, so far."""

    def probability(self, rows: pl.DataFrame) -> np.ndarray:
        """Probability of each row, shape (n,); NaN where it has no part."""
        found = np.full(rows.height, np.nan)
        for at, values in self._by_parts(rows, count=True):
            found[at] = values[0]
        return np.round(found, DECIMALS)

    def interval(self, rows: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the 95 % bootstrap interval of each row's probability, both of shape (n,)."""
        low, high = np.full((2, rows.height), np.nan)
        for at, values in self._by_parts(rows):
            ends = np.quantile(values, [0.025, 0.975], axis=0)
            low[at] = np.minimum(ends[0], values[0])
            high[at] = np.maximum(ends[1], values[0])
        return np.round(low, DECIMALS), np.round(high, DECIMALS)

    def expected(self, rows: pl.DataFrame, threshold: float) -> dict[str, Any]:
        """What a threshold is expected to let through and to cost, with 95 % intervals.

        Returns:
            wrong_before, wrong_kept (shares of wrong rows in all and among those kept) and
            right_lost (share of the right rows that are removed); each value, low, high, or null
            where it is a share of nothing.
        """
        sums = np.zeros((4, self._resamples + 1))  # rows, rows kept, right ones, right ones kept
        for _, values in self._by_parts(rows):
            kept = np.round(values[0], DECIMALS) >= threshold
            sums[0] += values.shape[1]
            sums[1] += kept.sum()
            sums[2] += values.sum(axis=1)
            sums[3] += values[:, kept].sum(axis=1)
        rows_in, rows_kept, right, right_kept = sums
        return {
            "wrong_before": _spread(rows_in - right, rows_in),
            "wrong_kept": _spread(rows_kept - right_kept, rows_kept),
            "right_lost": _spread(right - right_kept, right),
        }

    def _by_parts(
        self, rows: pl.DataFrame, count: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions of rows, and their probability by the model and by each resample's."""
        table = rows.select(pl.col(p).cast(pl.Float64).fill_null(np.nan) for p in self.parts)
        values = table.to_numpy().reshape(rows.height, len(self.parts))
        there = ~np.isnan(values)
        for pattern in np.unique(there, axis=0):
            mine = np.flatnonzero((there == pattern).all(axis=1))
            have = tuple(p for p, has in zip(self.parts, pattern, strict=True) if has)
            if not have:
                continue
            used, fits = self._model(have)
            self.reduced += len(mine) * (count and used != have)
            columns = [self.parts.index(name) for name in used]
            for start in range(0, len(mine), CHUNK):
                at = mine[start : start + CHUNK]
                scores = fits[:, :1] + fits[:, 1:] @ values[at][:, columns].T
                yield at, 1 / (1 + np.exp(-scores))

    def _model(self, have: tuple[str, ...]) -> tuple[tuple[str, ...], np.ndarray]:
        """Parts that are used where a row has these, and intercepts with coefficients."""
        if have not in self._models:
            sizes = range(len(have), 0, -1)
            sets = [names for size in sizes for names in combinations(have, size)]
            fit = (names for names in sets if too_few(self._with(names), self._least) is None)
            used = next(fit, ())
            self._models[have] = used, self._fits(self._with(used), used)
        return self._models[have]

    def _with(self, parts: tuple[str, ...]) -> pl.DataFrame:
        return self.known.drop_nulls(parts) if parts else self.known

    def _fits(self, known: pl.DataFrame, used: tuple[str, ...]) -> np.ndarray:
        values = known.select(used).to_numpy().reshape(known.height, len(used))
        right = known["right"].to_numpy()
        prompts = known["prompt_id"].unique().sort()
        at = prompts.search_sorted(known["prompt_id"]).to_numpy()
        fits = [_logistic(values, right, np.ones(known.height))]
        for index in range(self._resamples):
            weights = poisson_weights(self._seed, "confidence", prompts.to_list(), index)
            fits.append(_logistic(values, right, weights[at]))
        return np.array(fits)


def _logistic(values: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Intercept and coefficients of weighted rows; of the share alone without both classes."""
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression

    there = weights > 0
    x, y, w = values[there], right[there], weights[there]
    if not x.shape[1] or len(np.unique(y)) < 2:
        share = (w @ y + 1) / (w.sum() + 2)
        return np.r_[np.log(share / (1 - share)), np.zeros(x.shape[1])]
    centre, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-12] = 1.0
    model = LogisticRegression(C=1 / PENALTY, solver="newton-cholesky", tol=1e-8)
    with config_context(assume_finite=True, skip_parameter_validation=True):  # half of the time
        model.fit((x - centre) / scale, y, sample_weight=w)
    slopes = model.coef_[0] / scale
    return np.r_[model.intercept_[0] - slopes @ centre, slopes]


def _spread(parts: np.ndarray, wholes: np.ndarray) -> dict[str, float] | None:
    """A share by the model, with the interval of the resamples' shares; None of nothing."""
    if not wholes[0]:
        return None
    shares = parts / wholes
    low, high = np.quantile(shares, [0.025, 0.975])
    ends = min(low, shares[0]), max(high, shares[0])
    named = zip(("value", "low", "high"), (shares[0], *ends), strict=True)
    return {name: round(float(value), DECIMALS) for name, value in named}


def too_few(known: pl.DataFrame, least: int = LEAST_PROMPTS) -> str | None:
    """Why known rows are too few to learn a probability from; None where they are enough.

    Args:
        known: Columns `prompt_id` and `right`.
        least: Prompts with right answers, and with wrong ones, that are needed.
    """
    counts = [known.filter(pl.col("right") == x)["prompt_id"].n_unique() for x in (True, False)]
    if min(counts) >= least:
        return None
    return (
        f"{counts[0]} prompts with right and {counts[1]} with wrong answers, where {least} of each "
        "are needed"
    )


def cross_fitted(known: pl.DataFrame, parts: Sequence[str], seed: int) -> np.ndarray:
    """Probability of each known row by a `Joint` of other prompts, shape (n,).

    Prompts are dealt into `FOLDS` folds by hash. NaN where a row has no part.

    Args:
        known: As for `Joint`.
        parts: Names of the parts.
        seed: Of the folds.
    """
    prompts = known["prompt_id"].unique().sort()
    place = np.argsort(np.argsort(uniforms(seed, "confidence folds", prompts.to_list())))
    fold = place[prompts.search_sorted(known["prompt_id"]).to_numpy()] % FOLDS
    found = np.full(known.height, np.nan)
    for k in range(FOLDS):
        out = fold == k
        if out.any() and not out.all():
            rest = known.filter(~out)
            joint = Joint(rest, parts, seed, resamples=0, least=LEAST_PROMPTS // 2)
            found[out] = joint.probability(known.filter(out))
    return found


def calibration(frame: pl.DataFrame, parts: Sequence[str]) -> dict[str, Any]:
    """What is known of a confidence where rows are known to be right or wrong.

    Args:
        frame: Columns `confidence`, `right` (boolean) and one for each part; null where unknown.
            Rows without `right` or `confidence` are left out.
        parts: Names of the parts.

    Returns:
        rows, right, error (expected calibration error), bins (`reliability`), and auroc by part
        and for "confidence" (`ranking`).
    """
    known = frame.filter(pl.col("right").is_not_null() & pl.col("confidence").is_not_null())
    known = known.sort("confidence", "right", *parts)  # sums of floats depend on their order
    right = known["right"].to_numpy().astype(bool)
    bins = reliability(known["confidence"].to_numpy(), right)
    scores = {name: known[name].cast(pl.Float64).to_numpy() for name in ("confidence", *parts)}
    return {
        "rows": known.height,
        "right": int(right.sum()),
        "error": calibration_error(bins),
        "bins": bins,
        "auroc": {name: ranking(values, right) for name, values in scores.items()},
    }


def kept_by(frame: pl.DataFrame, group: str) -> pl.DataFrame:
    """Rows and rows kept of every group, largest first, ties by name.

    Args:
        frame: Columns `kept` and the group's; rows without a group are left out.
        group: Name of the column.

    Returns:
        by (the column's name), group, rows, kept, share.
    """
    return (
        frame.filter(pl.col(group).is_not_null())
        .group_by(pl.col(group).cast(pl.String).alias("group"))
        .agg(pl.len().cast(pl.Int64).alias("rows"), pl.col("kept").sum().cast(pl.Int64))
        .with_columns(pl.lit(group).alias("by"), (pl.col("kept") / pl.col("rows")).alias("share"))
        .sort("rows", "group", descending=[True, False])
        .select("by", "group", "rows", "kept", "share")
    )


def shown(table: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """The largest groups of `kept_by` as facts, by name; the rest together as "(others)"."""
    lines = table.to_dicts()
    facts = {
        line["group"]: {name: line[name] for name in ("rows", "kept", "share")}
        for line in lines[:SHOWN_GROUPS]
    }
    rest = lines[SHOWN_GROUPS:]
    if rest:
        rows, kept = sum(line["rows"] for line in rest), sum(line["kept"] for line in rest)
        facts["(others)"] = {"rows": rows, "kept": kept, "share": kept / rows}
    return facts
