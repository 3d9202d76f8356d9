"""Rejection sampling: verified answers of a sampler, more of them to harder prompts (DART-Math)."""

from collections.abc import Mapping
from typing import Any

from siftline.recipe.kinds import GATES, Stage, StageKind
from siftline.stages.rejection_sampling.options import RejectionSampling
from siftline.stages.verify.decide import verifier_of_rows


def notes(stage: Stage, facts: Mapping[str, Any]) -> list[str]:
    """Prompts whose targets were not met, and what two models' pass rates have in common."""
    ends, notes, name = facts["targets"], [], stage.name
    unsolved = ends.get("unsolved", 0)
    silent = facts.get("verifier_errors", 0)
    if silent:
        notes.append(
            f"{name}: the verifier failed on {silent} of {facts['draws']} draws; a prompt without "
            "a verified answer may lack no more than a verdict."
        )
    if unsolved:
        notes.append(
            f"{name}: {unsolved} prompts given up because their answers are expected to cost "
            "more draws than the cap; look at those without any, many are mislabelled (difficulty "
            "table, status unsolved)."
        )
    if ends.get("capped"):
        notes.append(
            f"{name}: {ends['capped']} prompts reached the cap with answers missing (difficulty "
            "table, status capped)."
        )
    cut = facts["refused"].get("truncated", 0)
    if cut > 0.1 * facts["draws"]:
        notes.append(f"{name}: {cut} of {facts['draws']} draws were cut: raise max_new_tokens.")
    if ends.get("failed"):
        notes.append(f"{name}: the sampler refused {ends['failed']} prompts.")
    if ends.get("out_of_budget"):
        notes.append(f"{name}: draws or tokens ran out with {ends['out_of_budget']} prompts open.")
    rates = facts.get("pass_rates")
    if rates and rates["prompts"]:
        alike = rates["correlation"]
        notes.append(
            f"{name}: pass rates of target and sampler on {rates['prompts']} prompts are "
            f"{100 * rates['target']:.1f} % and {100 * rates['sampler']:.1f} %, "
            + ("no correlation." if alike is None else f"correlation {alike:.2f}.")
        )
    return notes


KIND = StageKind(
    name="rejection_sampling",
    role="adds",
    options=RejectionSampling,
    run="siftline.stages.rejection_sampling.run:run",
    models=lambda options, budget: ("sampler", *options.more_roles),
    scorers=lambda options: () if options.target_scores is None else (options.target_scores,),
    repeats=GATES,
    prompts="answers",
    complete=verifier_of_rows,
    notes=notes,
)
