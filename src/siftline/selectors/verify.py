"""The verify gate: responses with an independent answer are held to it.

Pure: verdicts are facts that a verifier recorded earlier (`scoring/verifiers`). Only an answer
that is independent of the response proves anything, so a row whose answer was parsed from its own
response, or that has none, passes and is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from siftline.selectors.selection import Selection, decisions

VERIFIERS = ("math", "exact", "verbatim", "choice", "regex", "json_schema", "code")
"""Names that `siftline.scoring.verifiers.get_verifier` knows, beside import paths."""


def check_verifier(name: str, *more: str) -> None:
    """Refuses a name that is no verifier's, when a recipe is read; `more` are further names.

    Raises:
        ValueError: naming the known ones.
    """
    known = (*VERIFIERS, *more)
    if name not in known and ":" not in name:
        raise ValueError(
            f"unknown verifier {name!r}: use {', '.join(known)} or package.module:attribute"
        )


@dataclass(frozen=True)
class Verify:
    """Removes responses that contradict, or never reach, their independent answer.

    The frame has `id`, `answer`, `answer_from` (strings), `correct` (boolean, null where the
    verifier could not decide) and `extracted` (string, null where no final answer was found).

    Attributes:
        verifier: One of `VERIFIERS`, or an import path `package.module:attribute`.
        no_final_answer: Whether a row with an independent answer whose response has no final answer
            is removed (default) or kept. Strict extraction is DART-Math's setting for making data.
    """

    verifier: str = "math"
    no_final_answer: Literal["remove", "keep"] = "remove"

    def __post_init__(self) -> None:
        if self.no_final_answer not in ("remove", "keep"):
            raise ValueError(
                f"no_final_answer must be remove or keep, not {self.no_final_answer!r}"
            )
        check_verifier(self.verifier)

    def summarise(self, bucket: pl.DataFrame) -> None:
        return None

    def decide(self, states: Sequence[None]) -> None:
        return None

    def apply(self, bucket: pl.DataFrame, plan: None = None) -> Selection:
        independent = (
            pl.col("answer").is_not_null() & (pl.col("answer_from") == "independent")
        ).fill_null(False)
        unextracted = pl.col("correct").is_null() & pl.col("extracted").is_null()
        # A verdict that is still open although there was something to compare is a failed check:
        # such a row has proved nothing and goes no further.
        reason = (
            pl.when(~independent)
            .then(None)
            .when(pl.col("correct").eq_missing(False))
            .then(pl.lit("wrong_answer"))
            .when(unextracted)
            .then(pl.lit("no_final_answer") if self.no_final_answer == "remove" else None)
            .when(pl.col("correct").is_null())
            .then(pl.lit("verifier_error"))
        )
        judged = bucket.select(
            "id",
            reason.alias("reason"),
            independent.alias("independent"),
            pl.when(independent).then(pl.col("correct").cast(pl.Float64)).alias("value"),
        )
        counts = judged["reason"].drop_nulls().value_counts()
        return Selection(
            decisions(
                judged["id"],
                kept=judged["reason"].is_null(),
                reason=judged["reason"],
                value=judged["value"],
                threshold=1.0,
            ),
            facts={
                "verifier": self.verifier,
                "checked": int(judged["independent"].sum()),
                "without_independent_answer": int((~judged["independent"]).sum()),
                "removed": dict(sorted(counts.iter_rows())),
            },
            vacuous=not judged["independent"].any(),
        )
