"""Confidence: agreement with the model's own samples, and the model's own verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

from siftline.recipe.kinds import Stage, StageKind
from siftline.stages.confidence.options import Confidence


def notes(stage: Stage, facts: Mapping[str, Any]) -> list[str]:
    """How far reflection could be trusted on dev; said once, by the gate that measured it."""
    if "auroc" not in facts or stage.scope != "all":
        return []
    if facts["auroc"] is None:
        told = "reflection got weight 0, dev has too few right or wrong draws to judge it."
        return [f"{stage.name}: {told}"]
    interval = f"{facts['auroc']:.2f} ({facts['auroc_low']:.2f} to {facts['auroc_high']:.2f})"
    weights = facts["weights"]
    weight = weights.get("reflection", 0.0) / sum(weights.values())
    said = f"{stage.name}: AUROC of reflection on dev {interval}, weight {weight:.2f}"
    return [said + (", because the interval is not above 0.5." if weight == 0 else ".")]


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
