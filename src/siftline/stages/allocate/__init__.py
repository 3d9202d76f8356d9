"""Allocate: the budget by cluster, difficulty and fit; the last stage."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from siftline.recipe.kinds import Stage, StageKind
from siftline.stages.allocate.decide import Allocate


def _with_budget(options: dict[str, Any], before: Sequence[Stage], budget: Any) -> dict[str, Any]:
    for key in ("unit", "size", "on_shortfall"):
        if key in options:
            raise ValueError(f"stages.allocate: {key!r} belongs to the recipe's budget: move it")
    return {**options, **asdict(budget)}


KIND = StageKind(
    name="allocate",
    role="budget",
    options=Allocate,
    run="siftline.stages.allocate.run:run",
    models=lambda options, budget: ("target",),
    likelihoods=lambda options, budget: True,
    found=True,
    complete=_with_budget,
)
