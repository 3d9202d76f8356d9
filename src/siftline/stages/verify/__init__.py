"""Verify: responses with an independent answer are held to it."""

from siftline.recipe.kinds import StageKind
from siftline.stages.verify.decide import Verify
from siftline.stages.verify.notes import notes

KIND = StageKind(
    name="verify",
    role="gate",
    options=Verify,
    run="siftline.stages.verify.run:run",
    planted=("swapped_answer", "truncated", "one_number", "gold_answer"),
    notes=notes,
)
