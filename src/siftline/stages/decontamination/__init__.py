"""Decontamination: rows that overlap an evaluation set."""

from siftline.recipe.kinds import StageKind
from siftline.stages.decontamination.decide import Decontamination

KIND = StageKind(
    name="decontamination",
    role="gate",
    options=Decontamination,
    run="siftline.stages.decontamination.run:run",
    sets=lambda options: ("target", "dev", "test"),
    planted=("leaked", "other_question"),
    prompts="passes",
)
