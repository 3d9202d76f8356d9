"""Auto-Correct (CLEAR, arXiv 2403.12776): who proposes to whom, and which proposals are taken.

A model that is fine-tuned on the rows the confidence gate kept proposes an answer to every prompt;
a judge compares it with the row's own. CLEAR lets the model propose to the prompts it was trained
on, where it repeats the errors it memorised; here prompts are dealt to folds, and a fold is served
by a model trained on the others. The judge is asked in both orders, since judges favour a place.

Numbers only: training, generating and asking are elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from siftline.kernels.draws import uniforms

PROPOSALS = {
    "id": pl.String,
    "in_play": pl.Boolean,  # false: an earlier gate removed the row for low confidence
    "barred": pl.String,  # why no verdict was sought or given; null where there is none to say
    "verdict": pl.String,  # "candidate" or "original"; null where the two orders disagree
    "confidence": pl.Float64,  # of the verdict
}
ADOPTED = ("corrected", "rescued")
"""Outcomes that add a row: in place of one in play, or of one that a gate removed."""


def fold_of(prompts: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """The fold of each prompt, by hash of its id: rows that answer one prompt share it.

    Args:
        prompts: n prompt ids.
        folds: How many, at least 1.
        seed: The recipe's seed.

    Returns:
        int64 in [0, folds), shape (n,).
    """
    return np.floor(uniforms(seed, "correct fold", prompts) * folds).astype(np.int64)


@dataclass(frozen=True)
class CorrectionRule:
    """Takes a candidate where the judge prefers it with a confidence above a bound.

    Outcomes: `corrected` and `rescued` (see `ADOPTED`); `unsure`, preferred but not above the
    bound; `original_better`; `undecided`, the orders disagree; or what barred the proposal.

    Attributes:
        confidence: The bound (CLEAR's eta, 0.8). 1 or more takes nothing: a dry run.
    """

    confidence: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.confidence < float("inf"):
            raise ValueError(f"confidence is {self.confidence}: give a number from 0 up")

    def outcomes(self, proposals: pl.DataFrame) -> pl.Series:
        """The outcome of each of `PROPOSALS`, in their order."""
        above = (pl.col("confidence") > self.confidence).fill_null(False)
        outcome = (
            pl.when(pl.col("barred").is_not_null())
            .then(pl.col("barred"))
            .when(pl.col("verdict").is_null())
            .then(pl.lit("undecided"))
            .when(pl.col("verdict") == "original")
            .then(pl.lit("original_better"))
            .when(~above)
            .then(pl.lit("unsure"))
            .when("in_play")
            .then(pl.lit(ADOPTED[0]))
            .otherwise(pl.lit(ADOPTED[1]))
        )
        return proposals.select(outcome.alias("outcome"))["outcome"]


def judged_facts(proposals: pl.DataFrame) -> dict[str, Any]:
    """What the judge did, over proposals with `as_second` and `as_first` (see `preference`).

    Returns:
        asked, failed (no usable reply), candidate, original, undecided; and of the undecided how
        many held to a place: always the answer shown first, or always the second.
    """
    failed = int((proposals["barred"] == "judge_failed").fill_null(False).sum())
    told = proposals.filter(pl.col("as_second").is_not_null() & pl.col("as_first").is_not_null())
    counts = dict(told["verdict"].drop_nulls().value_counts().iter_rows())
    first = told.filter((pl.col("as_second") < 0.5) & (pl.col("as_first") > 0.5)).height
    second = told.filter((pl.col("as_second") > 0.5) & (pl.col("as_first") < 0.5)).height
    return {
        "asked": told.height + failed,
        "failed": failed,
        "candidate": counts.get("candidate", 0),
        "original": counts.get("original", 0),
        "undecided": told["verdict"].null_count(),
        "always_first": first,
        "always_second": second,
    }
