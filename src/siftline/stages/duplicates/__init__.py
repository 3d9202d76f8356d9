"""Duplicates: exact and near copies, of prompts and responses."""

from siftline.recipe.kinds import StageKind
from siftline.stages.duplicates.decide import Duplicates

KIND = StageKind(
    name="duplicates",
    role="gate",
    options=Duplicates,
    run="siftline.stages.duplicates.run:run",
    seeded=False,  # its seed makes the permutation table
    planted=("near_copy", "other_question"),
    prompts="passes",
)
