"""Correct: a judged response is replaced by a better one of a tuned model (CLEAR)."""

from collections.abc import Mapping, Sequence
from typing import Any

from siftline.recipe.kinds import GATES, Stage, StageKind
from siftline.stages.correct.options import Correct


def notes(stage: Stage, facts: Mapping[str, Any]) -> list[str]:
    """What was corrected, and whether the judge can be trusted."""
    judge = facts["judge"]
    notes = [f"{stage.name}: {facts['corrected']} responses corrected, {facts['rescued']} rescued."]
    if judge["failed"]:
        notes.append(
            f"{stage.name}: no usable verdict on {judge['failed']} of {judge['asked']} pairs."
        )
    by_place, told = (
        judge["always_first"] + judge["always_second"],
        judge["asked"] - judge["failed"],
    )
    if 2 * by_place > told:
        notes.append(f"{stage.name}: the judge chose by place in {by_place} of {told} pairs.")
    return notes


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
