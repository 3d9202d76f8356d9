"""S3FT: a response the model can say in its own words is replaced by them."""

from collections.abc import Mapping
from typing import Any

from siftline.recipe.kinds import GATES, Stage, StageKind
from siftline.stages.s3ft.options import SelfAnswers
from siftline.stages.verify.decide import verifier_of_rows


def notes(stage: Stage, facts: Mapping[str, Any]) -> list[str]:
    """Which words replaced the references."""
    routes = facts["routes"]
    asked = sum(routes[k] for k in ("own_answer", "paraphrase", "reference")) or 1
    said = ", ".join(
        f"{100 * routes[key] / asked:.0f} % {words}"
        for key, words in (
            ("own_answer", "the model's own answer"),
            ("paraphrase", "its paraphrase"),
            ("reference", "the reference"),
        )
    )
    warning = "Tuning on own outputs alone has been seen to hurt (arXiv 2502.04194)."
    return [f"{stage.name}: {said}. {warning}"]


KIND = StageKind(
    name="s3ft",
    role="adds",
    options=SelfAnswers,
    run="siftline.stages.s3ft.run:run",
    models=lambda options, budget: options.roles,
    repeats=GATES,
    complete=verifier_of_rows,
    notes=notes,
)
