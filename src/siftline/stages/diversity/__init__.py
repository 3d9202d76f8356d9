"""Diversity: prompts drawn from clusters of embeddings, more than the budget needs."""

from typing import Any

from siftline.recipe.kinds import StageKind
from siftline.stages.diversity.decide import Shortlist


def _models(options: Any, budget: Any) -> tuple[str, ...]:
    # Loss tokens of a row are the target model's.
    return ("embedder", *(["target"] if budget.unit == "loss_tokens" else []))


KIND = StageKind(
    name="diversity",
    role="shortlist",
    options=Shortlist,
    run="siftline.stages.diversity.run:run",
    models=_models,
    likelihoods=lambda options, budget: "target" in _models(options, budget),
    scorers=lambda options: () if options.weight == "uniform" else (options.weight,),
    budgeted=True,
    prompts="passes",
)
