"""Allocate: the budget by cluster, difficulty and fit; the last stage."""

from collections.abc import Mapping, Sequence
from typing import Any

from siftline.recipe.kinds import Stage, StageKind
from siftline.selectors.spending import REST
from siftline.stages.allocate.decide import Allocate
from siftline.stages.rejection_sampling.options import SOURCE

_SOURCES = {"rejection_sampling": SOURCE, "s3ft": "self", "correct": "corrected"}
"""Sources of the rows that stages of a kind add."""
_RULES = {"vanilla": "uniform"}
"""Targets of a sampling stage under another name here: vanilla keeps up to its k draws."""


def _completed(options: dict[str, Any], before: Sequence[Stage], budget: Any) -> dict[str, Any]:
    """Options with, where draws came before, what was drawn for.

    Several sampling stages add their answers to the same prompts: as many are kept as all of them
    aim at, by the targets of the last.
    """
    drawn = _sampling(before)
    taken: dict[str, Any] = {}
    if drawn:
        last = drawn[-1].options
        taken = {
            "targets": _RULES.get(last.target, last.target),
            "answers": sum(stage.options.k for stage in drawn),
            "max_quantile": last.max_quantile,
            "own_samples": True,
        }
    return {**taken, **options}


def _sampling(before: Sequence[Stage]) -> list[Stage]:
    return [stage for stage in before if stage.kind == "rejection_sampling"]


def _check(stage: Stage, before: Sequence[Stage]) -> None:
    """Refuses draws that can't be kept, as far as the stages alone tell."""
    drawn = _sampling(before)
    options: Allocate = stage.options
    where = f"stages.{stage.name}"
    for one in before:
        source = _SOURCES.get(one.kind)
        if source and options.mixture and not _weighs(options.mixture, source):
            raise ValueError(
                f"{where}: mixture leaves out {source!r}, the source of the rows that {one.name} "
                f"adds, so none can be kept: give {source!r} or {REST!r} a weight"
            )
    if not drawn:
        if options.targets == "scores":
            raise ValueError(
                f"{where}: targets scores are those of a rejection_sampling stage, and none comes "
                "before: add one, or use uniform or prop2diff"
            )
        return
    most = sum(one.options.k for one in drawn)
    if options.answers >= most:
        return
    aimed = [one for one in drawn if one.options.target not in ("uniform", "vanilla")]
    if aimed:
        raise ValueError(
            f"{where}: answers is {options.answers}, and {aimed[-1].name} draws up to {most} for "
            f"hard prompts (target {aimed[-1].options.target}), which can't be kept: leave answers "
            f"out, or set {aimed[-1].name}'s k to {options.answers}"
        )
    if options.fit == "random":
        raise ValueError(
            f"{where}: answers is {options.answers} of the {most} that {drawn[-1].name} draws, and "
            f"fit random has no use for a choice: leave answers out, or set {drawn[-1].name}'s k "
            f"to {options.answers}"
        )


def _weighs(mixture: Mapping[str, float], source: str) -> bool:
    return mixture.get(source, mixture.get(REST, 0.0)) > 0


def _settled(stage: Stage, recipe: Any) -> Stage:
    """Refuses draws that come from the target model where its samples do not compete."""
    drawn = _sampling(recipe.stages)
    if (
        drawn
        and not stage.options.own_samples
        and recipe.model("sampler") == recipe.model("target")
    ):
        raise ValueError(
            f"stages.{stage.name}: own_samples is off, and {drawn[-1].name} draws from the target "
            "model itself, so no draw can be kept: leave own_samples out, or name another model "
            "in roles.sampler"
        )
    return stage


def _notes(stage: Stage, facts: Mapping[str, Any]) -> list[str]:
    """What came of the draws."""
    draws = facts.get("draws")
    if not draws:
        return []
    lost = ", ".join(f"{n} {reason}" for reason, n in draws["removed"].items())
    said = f"{stage.name}: kept {draws['kept']} of {draws['offered']} draws"
    return [f"{said} ({lost})." if lost else f"{said}."]


KIND = StageKind(
    name="allocate",
    role="budget",
    options=Allocate,
    run="siftline.stages.allocate.run:run",
    models=lambda options, budget: ("target",),
    likelihoods=lambda options, budget: True,
    found=True,
    from_budget=("size", "unit", "on_shortfall"),
    complete=_completed,
    check=_check,
    settle=_settled,
    notes=_notes,
)
