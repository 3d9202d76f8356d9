"""Quality rules: the form of a text, its language, listed words, bounds on scores."""

from typing import Any

from siftline.recipe.kinds import Stage, StageKind
from siftline.stages.quality_rules.decide import QualityRules


def _versions(stage: Stage, recipe: Any) -> dict[str, Any]:
    """Versions of the libraries that rules come from, and the list of words."""
    from siftline.stages.quality_rules.run import quality_inputs

    return {"rules": quality_inputs(stage)}


KIND = StageKind(
    name="quality_rules",
    role="gate",
    options=QualityRules,
    run="siftline.stages.quality_rules.run:run",
    scorers=lambda options: tuple(sorted(options.scores)),
    inputs=_versions,
    planted=("looped", "other_question"),
)
