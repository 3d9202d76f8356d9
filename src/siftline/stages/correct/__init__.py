"""Correct: a judged response is replaced by a better one of a tuned model (CLEAR)."""

from collections.abc import Sequence

from siftline.recipe.kinds import GATES, Stage, StageKind
from siftline.stages.correct.notes import notes
from siftline.stages.correct.options import Correct


def _check(stage: Stage, before: Sequence[Stage]) -> None:
    if "confidence" not in [other.kind for other in before]:
        raise ValueError(f"stages.{stage.name}: correct mends what confidence judged: put it after")


KIND = StageKind(
    name="correct",
    role="adds",
    options=Correct,
    run="siftline.stages.correct.run:run",
    models=lambda options, budget: ("target", "judge"),
    # A verdict was their gate: `confidence.run` says why confidence does not judge them.
    repeats=tuple(kind for kind in GATES if kind != "confidence"),
    check=_check,
    notes=notes,
)
