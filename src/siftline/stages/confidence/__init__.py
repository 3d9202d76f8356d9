"""Confidence: agreement with the model's own samples, and the model's own verdict."""

from collections.abc import Sequence

from siftline.recipe.kinds import Stage, StageKind
from siftline.stages.confidence.notes import notes
from siftline.stages.confidence.options import Confidence


def _check(stage: Stage, before: Sequence[Stage]) -> None:
    stage.options.check_after([other.kind for other in before], f"stages.{stage.name}")


KIND = StageKind(
    name="confidence",
    role="gate",
    options=Confidence,
    run="siftline.stages.confidence.run:run",
    models=lambda options, budget: ("sampler", "judge", *options.more_roles),
    sets=lambda options: ("dev",),
    planted=("swapped_answer", "truncated", "one_number"),
    check=_check,
    notes=notes,
    histogram=("confidence", "confidence"),
)
