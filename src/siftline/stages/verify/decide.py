"""The verify gate: responses with an independent answer are held to it.

Pure: verdicts are facts that a verifier recorded earlier (`scoring/verifiers`). Only an answer
that is independent of the response proves anything, so a row whose answer was parsed from its own
response, or that has none, passes and is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from siftline.recipe.kinds import Stage
from siftline.selectors.selection import Selection, decisions

VERIFIERS = (
    "math", "exact", "verbatim", "choice", "regex", "json_schema", "code", "instructions",
)  # fmt: skip
"""Names that `siftline.scoring.verifiers.get_verifier` knows, beside import paths."""
OPEN = ("unreadable", "verifier_error")
"""Outcomes of open verdicts on a response that has a final answer."""


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


def verifier_of_rows(
    options: dict[str, Any], before: Sequence[Stage], budget: Any
) -> dict[str, Any]:
    """Options of a stage that draws answers: they are held to what the rows were held to."""
    checks = [stage.options.verifier for stage in before if stage.kind == "verify"]
    return {"verifier": checks[-1] if checks else "math", **options}


@dataclass(frozen=True)
class Verify:
    """Removes responses that contradict, or never reach, their independent answer.

    A verdict is a match, a mismatch (a proof), or open: nobody can tell. The frame has `id`,
    `answer`, `answer_from` (strings), `correct` (boolean, null where the verdict is open),
    `extracted` (string, null where no final answer was found) and, where known, `said` (string,
    the verdict's reason).

    Attributes:
        verifier: One of `VERIFIERS`, or an import path `package.module:attribute`.
        no_final_answer: Whether a row with an independent answer whose response has no final answer
            is removed (default) or kept. Strict extraction is DART-Math's setting for making data.
        open: Whether a row is removed as `unreadable` (default) or kept where there is something
            to compare and the verdict is still open: an answer or a reference that can't be read,
            two answers, a library that is not there. The gate promises verified rows, and such a
            row has proved nothing; keep it where losing a good row costs more than a bad one.
            Where the verifier itself failed (`verifier_error`), a row that is not kept has failed
            rather than gone: the next run tries it again.
    """

    verifier: str = "math"
    no_final_answer: Literal["remove", "keep"] = "remove"
    open: Literal["remove", "keep"] = "remove"

    def __post_init__(self) -> None:
        for name in ("no_final_answer", "open"):
            value = getattr(self, name)
            if value not in ("remove", "keep"):
                raise ValueError(f"{name} must be remove or keep, not {value!r}")
        check_verifier(self.verifier)

    def summarise(self, bucket: pl.DataFrame) -> None:
        return None

    def decide(self, states: Sequence[None]) -> None:
        return None

    def apply(self, bucket: pl.DataFrame, plan: None = None) -> Selection:
        judged = bucket.select(
            "id",
            _outcome("said" in bucket.columns).alias("outcome"),
            pl.col("correct").cast(pl.Float64).alias("value"),
        ).with_columns(pl.when(pl.col("outcome").is_not_null()).then(pl.col("value")))
        kept = ["match"]
        kept += ["no_final_answer"] if self.no_final_answer == "keep" else []
        kept += list(OPEN) if self.open == "keep" else []
        stays = judged["outcome"].is_null() | judged["outcome"].is_in(kept)
        outcomes = dict(sorted(judged["outcome"].drop_nulls().value_counts().iter_rows()))
        return Selection(
            decisions(
                judged["id"],
                kept=stays,
                reason=judged["outcome"],
                value=judged["value"],
                threshold=1.0,
            ),
            facts={
                "verifier": self.verifier,
                "checked": sum(outcomes.values()),
                "without_independent_answer": int(judged["outcome"].is_null().sum()),
                "removed": {name: n for name, n in outcomes.items() if name not in kept},
                "kept_open": {
                    name: n for name, n in outcomes.items() if name in kept and name != "match"
                },
            },
            vacuous=not outcomes,
        )


def _outcome(told: bool) -> pl.Expr:
    """What came of each row's check; null where there was nothing to check it against."""
    independent = (
        pl.col("answer").is_not_null() & (pl.col("answer_from") == "independent")
    ).fill_null(False)
    missing, failed = "no_final_answer", "verifier_error"
    if told:
        kind = pl.col("said").str.split(":").list.first().fill_null(failed)
    else:
        unread = pl.col("extracted").is_null()
        kind = pl.when(unread).then(pl.lit(missing)).otherwise(pl.lit(failed))
    return (
        pl.when(~independent)
        .then(None)
        .when(pl.col("correct").eq_missing(True))
        .then(pl.lit("match"))
        .when(pl.col("correct").eq_missing(False))
        .then(pl.lit("wrong_answer"))
        .when(kind.is_in([missing, failed]))
        .then(kind)
        .otherwise(pl.lit("unreadable"))
    )
