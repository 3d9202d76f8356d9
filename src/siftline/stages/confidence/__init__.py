"""Confidence: agreement with the model's own samples, and the model's own verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from siftline.recipe.kinds import Stage, StageKind
from siftline.stages.confidence.options import Confidence


def notes(stage: Stage, facts: Mapping[str, Any]) -> list[str]:
    """What a confidence is here, and what the cut is expected to do; said by the first instance."""
    if stage.scope != "all":
        return []
    found = [*_reflection(facts), *_probability(facts), *_cut(stage, facts)]
    return [f"{stage.name}: {said}" for said in found]


def _reflection(facts: Mapping[str, Any]) -> list[str]:
    """How far reflection could be trusted on dev."""
    if "auroc" not in facts:
        return []
    used = "is used" if facts["weights"].get("reflection") else "is not used"
    if facts["auroc"] is None:
        return [f"reflection {used}, dev has too few right or wrong answers to judge it."]
    interval = f"{facts['auroc']:.2f} ({facts['auroc_low']:.2f} to {facts['auroc_high']:.2f})"
    why = "" if used == "is used" else ", because the interval is not above 0.5"
    return [f"AUROC of reflection on dev {interval}; it {used}{why}."]


def _probability(facts: Mapping[str, Any]) -> list[str]:
    """What the probability was learnt from, and what it expects of the rows."""
    if "expected" not in facts:
        return []
    dev, expected = facts["dev"], facts["expected"]
    wrong = dev["rows"] - dev["right"]
    said = [
        f"confidence is the probability of a right answer, learnt from {dev['right']} right and "
        f"{wrong} wrong {dev['of']} (expected calibration error {dev['error']:.3f}, cross-fitted)."
    ]
    if expected["wrong_kept"] is not None:
        said.append(
            f"expected share of wrong rows {_share(expected['wrong_before'])} before and "
            f"{_share(expected['wrong_kept'])} among those kept; of the right rows "
            f"{_share(expected['right_lost'])} are lost."
        )
    if facts["fewer_parts"]:
        said.append(
            f"{facts['fewer_parts']} rows have parts that too few dev answers have, and are judged "
            "without these."
        )
    return said


def _cut(stage: Stage, facts: Mapping[str, Any]) -> list[str]:
    """Cuts that could not be told, and cuts that removed nothing."""
    said = []
    if facts.get("cut_as_quantile"):
        said.append(
            f"the cut of {stage.options.cut:g} can't be told as a probability, because "
            f"{facts['why_no_probability']}: it was the quantile of a weighted mean for "
            f"{facts['cut_as_quantile']} rows."
        )
    if facts.get("below") == 0 and facts.get("scored"):
        said.append(
            f"all {facts['scored']} rows stay: none has a confidence below "
            f"{facts['threshold']:.3g}."
        )
    return said


def _share(share: Mapping[str, float]) -> str:
    value, low, high = (100 * share[name] for name in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


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
