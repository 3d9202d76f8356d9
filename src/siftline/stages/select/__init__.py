"""Select: a method of `siftline select --list` as a stage."""

from typing import Any

from siftline.recipe.kinds import Stage, StageKind
from siftline.stages.select.options import Select


def _models(options: Any, budget: Any) -> tuple[str, ...]:
    target = options.likelihoods(budget.unit) or options.differentiates
    target = target or options.trains or options.warms
    return (*(["target"] if target else []), *(["embedder"] if options.embeds else []))


def _training(stage: Stage, recipe: Any) -> dict[str, Any]:
    """How the models that a method trains between its rounds are trained."""
    if not stage.options.trains:
        return {}
    from siftline.stages.select.rounds import training_inputs

    return {"training": training_inputs(recipe)}


def _methods() -> dict[str, type]:
    from siftline.selectors.registry import methods

    return {entry.name: entry.method for entry in methods()}


KIND = StageKind(
    name="select",
    role="shortlist",
    options=Select,
    run="siftline.stages.select.run:run",
    models=_models,
    likelihoods=lambda options, budget: options.likelihoods(budget.unit),
    sets=lambda options: ("target",) if options.entry.targeted else (),
    scorers=lambda options: (*options.scorers(), *options.asked()),
    budgeted=True,
    inputs=_training,
    methods=_methods,
)
