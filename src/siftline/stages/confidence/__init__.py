"""Confidence: agreement with the model's own samples, and the model's own verdict."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from siftline.recipe.kinds import Stage, StageKind
from siftline.stages.confidence.notes import notes
from siftline.stages.confidence.options import Confidence


def _check(stage: Stage, before: Sequence[Stage]) -> None:
    stage.options.check_after([other.kind for other in before], f"stages.{stage.name}")


def _completed(options: dict[str, Any], before: Sequence[Stage], budget: Any) -> dict[str, Any]:
    """Whole responses are the answers where the verifier says so."""
    checks = [stage.options.verifier for stage in before if stage.kind == "verify"]
    whole = bool(checks) and checks[-1] in ("exact", "verbatim")
    return {**({"answers": "exact"} if whole else {}), **options}


def _settled(stage: Stage, recipe: Any) -> Stage:
    """Texts are compared by a cross-encoder where the recipe names one."""
    options: Confidence = stage.options
    if options.similarity != "auto":
        return stage
    if "nli" in recipe.roles:
        return replace(stage, options=replace(options, similarity="nli"))
    return replace(stage, options=replace(options, similarity="embedding"))


KIND = StageKind(
    name="confidence",
    role="gate",
    options=Confidence,
    run="siftline.stages.confidence.run:run",
    models=lambda options, budget: ("sampler", "judge", *options.more_roles),
    sets=lambda options: ("dev",),
    planted=("swapped_answer", "truncated", "one_number"),
    complete=_completed,
    check=_check,
    settle=_settled,
    notes=notes,
    histogram=("confidence", "confidence"),
)
