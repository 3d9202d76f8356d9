"""Allocate: the budget by cluster, difficulty and fit; the last stage."""

from siftline.recipe.kinds import StageKind
from siftline.stages.allocate.decide import Allocate

KIND = StageKind(
    name="allocate",
    role="budget",
    options=Allocate,
    run="siftline.stages.allocate.run:run",
    models=lambda options, budget: ("target",),
    likelihoods=lambda options, budget: True,
    found=True,
    from_budget=("size", "unit", "on_shortfall"),
)
