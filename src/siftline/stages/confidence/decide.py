"""The confidence gate (CLEAR, arXiv 2403.12776): drops responses the base model does not trust.

Confidence follows BSDetector (arXiv 2308.16175) and its successor cleanlab/tlm: how well sampled
answers agree with the row's own, by one or several similarities, what the model says when asked
whether the answer is right, and how likely it finds the response. This module holds the numbers
only; sampling and asking are in scoring. `auroc` tells whether a part says anything: an interval
that reaches 0.5 means it deserves no weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import polars as pl

from siftline.config import nearest
from siftline.rows.selection import Selection, decisions

if TYPE_CHECKING:
    from siftline.stages.confidence.calibration import Joint

PARTS = ("agreement", "jaccard", "embedding", "nli", "reflection", "perplexity")
"""What confidence may be made of, each a number in [0, 1]: the share of samples with the row's own
final answer; mean word overlap, cosine and lack of contradiction with them; the judge's verdict;
the mean probability of the response's tokens under the target model."""
BSDETECTOR = {"agreement": 0.7, "reflection": 0.3}
"""BSDetector's beta of 0.7 for consistency, the rest for reflection."""


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuses weights that are no weights.

    Raises:
        ValueError: naming the part that is unknown or negative, or if no part has a weight.
    """
    for part, weight in weights.items():
        if part not in PARTS:
            raise ValueError(f"weights: no part {part!r}: {nearest(part, PARTS)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weights: {part} has {weight}: give a number from 0 up")
    if not any(weights.values()):
        raise ValueError(f"weights are {dict(weights)}: give at least one part a weight above 0")


@dataclass(frozen=True)
class Scored:
    """What one bucket tells the gate: 8 bytes a row, because exact quantiles need all of them.

    Attributes:
        confidence: NaN where a row has no part, shape (n,).
        missing: Rows that lack a part, by part.
    """

    confidence: np.ndarray
    missing: dict[str, int]


@dataclass(frozen=True)
class ConfidenceGate:
    """Keeps rows whose confidence is at or above a threshold (so ties stay).

    Buckets hold `id` and one column for each part of positive weight (see `PARTS`), in [0, 1], null
    where the row lacks it. Confidence is the probability of `joint`, or the weighted mean of the
    parts a row has, weights renormalised (cleanlab/tlm); the facts count how many rows lacked
    which. A row without any part is not kept, with reason `no_confidence`, and listed in the facts:
    it failed rather than lost.

    Attributes:
        threshold: "absolute" keeps confidence >= cut; "quantile" drops about the share `cut` of
            the scored rows, never more; "median" is CLEAR's own rule, quantile 0.5. The last two
            drop clean rows too.
        cut: Default 0.5: more likely right than wrong.
        weights: Weight by part; see `BSDETECTOR`. Give a part no weight where `auroc` finds it
            uninformative. With `joint` it says which parts are read.
        joint: What makes a probability of the parts.
    """

    threshold: Literal["absolute", "quantile", "median"] = "absolute"
    cut: float = 0.5
    weights: Mapping[str, float] = field(default_factory=lambda: dict(BSDETECTOR))
    joint: "Joint | None" = None

    def __post_init__(self) -> None:
        if self.threshold not in ("absolute", "quantile", "median"):
            raise ValueError(
                f"threshold is {self.threshold!r}: use 'absolute', 'quantile' or 'median'"
            )
        if not 0 <= self.cut <= 1:
            raise ValueError(f"cut is {self.cut}: give a number from 0 to 1")
        if self.threshold == "median" and self.cut != 0.5:
            raise ValueError(f"cut is {self.cut} with 'median': leave it out, or use 'quantile'")
        check_weights(self.weights)

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts with a weight, in one order whatever the recipe's."""
        return tuple(part for part in PARTS if self.weights.get(part, 0.0) > 0)

    def summarise(self, bucket: pl.DataFrame) -> Scored:
        lacking = {part: bucket[part].fill_nan(None).null_count() for part in self.parts}
        return Scored(self._confidence(bucket), lacking)

    def decide(self, states: Sequence[Scored]) -> "Plan":
        pooled = np.concatenate([np.zeros(0), *(state.confidence for state in states)])
        scored = np.sort(pooled[~np.isnan(pooled)])
        at = self.cut
        if self.threshold != "absolute":
            # floor(q n) rows lie below this value, fewer where it is tied.
            q = int(np.floor(np.round(self.cut * len(scored), 9)))
            at = float(scored[min(q, len(scored) - 1)]) if len(scored) else 0.0
        facts = {
            "rows": len(pooled),
            "scored": len(scored),
            "threshold": at,
            "below": int((scored < at).sum()),
            "missing": {part: sum(s.missing[part] for s in states) for part in self.parts},
            "histogram": np.histogram(scored, bins=20, range=(0.0, 1.0))[0].tolist(),
        }
        return Plan(at, facts)

    def apply(self, bucket: pl.DataFrame, plan: "Plan") -> Selection:
        bucket = bucket.sort("id")
        confidence = pl.Series(self._confidence(bucket), dtype=pl.Float64).fill_nan(None)
        ids = bucket["id"].cast(pl.String)
        without = confidence.is_null()
        decided = decisions(
            ids,
            kept=(confidence >= plan.threshold).fill_null(False),
            reason=["no_confidence" if lost else "low_confidence" for lost in without],
            value=confidence,
            threshold=plan.threshold,
        )
        failed = {"no_confidence": ids.filter(without).to_list()}
        return Selection(decided, {**plan.facts, **failed}, vacuous=plan.facts["scored"] == 0)

    def _confidence(self, bucket: pl.DataFrame) -> np.ndarray:
        parts = np.stack([bucket[name].cast(pl.Float64).to_numpy() for name in self.parts], axis=1)
        bad = np.flatnonzero(((parts < 0) | (parts > 1)).any(axis=1))
        if len(bad):
            raise ValueError(
                f"{len(bad)} rows have a score outside [0, 1], first {bucket['id'][int(bad[0])]}: "
                f"{parts[bad[0]].tolist()}; rescale it"
            )
        if self.joint is not None:
            return self.joint.probability(bucket)
        return weighted_mean(parts, np.array([self.weights[name] for name in self.parts]))


@dataclass(frozen=True)
class Plan:
    """The threshold in use and the facts of the whole pool."""

    threshold: float
    facts: dict[str, Any]


def weighted_mean(parts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean per row over the parts that are not NaN.

    Args:
        parts: Scores, shape (n, p), NaN where a part is missing.
        weights: Non-negative weights, shape (p,).

    Returns:
        float64, shape (n,); NaN where no part of positive weight is there.
    """
    mass = np.where(np.isnan(parts), 0.0, weights)
    total = mass.sum(axis=1)
    summed = (mass * np.nan_to_num(parts)).sum(axis=1)
    return np.divide(summed, total, out=np.full(len(parts), np.nan), where=total > 0)


def consistency(candidate_answers: Sequence[str | None], own_answer: str | None) -> float | None:
    """Share of sampled answers that equal the row's own final answer.

    Args:
        candidate_answers: Final answers of the samples, extracted and normalised; None where a
            sample has none, which does not count as equal.
        own_answer: The row's own final answer, likewise.

    Returns:
        A share in [0, 1]; None where the row has no final answer, or no sample has one: there is
        nothing to compare, and that is no disagreement.
    """
    if own_answer is None or all(answer is None for answer in candidate_answers):
        return None
    return sum(answer == own_answer for answer in candidate_answers) / len(candidate_answers)


class Auroc(NamedTuple):
    """An area under the ROC curve with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def informative(self) -> bool:
        """True when the score ranks right above wrong beyond chance."""
        return self.low > 0.5


def auroc(scores: np.ndarray, labels: np.ndarray) -> Auroc:
    """Area under the ROC curve with a 95 % DeLong interval on the logit scale.

    The variance is DeLong et al. 1988; the logit keeps the interval inside [0, 1] (Qin & Hotilovac
    2008). A perfect ranking has variance 0, so there the bound is Clopper-Pearson's for the
    min(m, n) disjoint pairs, all ranked right: it includes 0.5 below six pairs. Nothing is drawn.

    Args:
        scores: Shape (n,), finite; ties count half.
        labels: True for positives, shape (n,).

    Returns:
        Value, lower and upper end.

    Raises:
        ValueError: if a score is not finite or a class has fewer than two rows.
    """
    labels = np.asarray(labels, dtype=bool)
    scores = np.asarray(scores, dtype=np.float64)
    positive, negative = scores[labels], scores[~labels]
    if not np.all(np.isfinite(scores)):
        raise ValueError(f"{(~np.isfinite(scores)).sum()} scores are not finite: leave them out")
    if min(len(positive), len(negative)) < 2:
        raise ValueError(
            f"{len(positive)} positive and {len(negative)} negative rows: label at least 2 of each"
        )
    beaten = _share_below(positive, negative)  # per positive: share of negatives it outranks
    lost = 1.0 - _share_below(negative, positive)  # per negative: share of positives above it
    value = float(beaten.mean())
    if value in (0.0, 1.0):
        edge = 0.025 ** (1 / min(len(positive), len(negative)))
        return Auroc(value, edge, 1.0) if value else Auroc(value, 0.0, 1 - edge)
    variance = beaten.var(ddof=1) / len(beaten) + lost.var(ddof=1) / len(lost)
    logit = np.log(value / (1 - value))
    half = NormalDist().inv_cdf(0.975) * np.sqrt(variance) / (value * (1 - value))
    low, high = 1 / (1 + np.exp(-(logit - half))), 1 / (1 + np.exp(-(logit + half)))
    return Auroc(value, float(low), float(high))


def _share_below(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For each of `a`, the share of `b` below it, ties counted half."""
    b = np.sort(b)
    return (np.searchsorted(b, a, side="left") + np.searchsorted(b, a, side="right")) / (2 * len(b))
