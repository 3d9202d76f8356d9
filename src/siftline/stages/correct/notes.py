"""What the report says of corrections."""

from collections.abc import Mapping
from typing import Any

from siftline.recipe.kinds import Stage


def notes(stage: Stage, facts: Mapping[str, Any]) -> list[str]:
    """What was corrected, and whether the judge can be trusted."""
    judge = facts["judge"]
    notes = [f"{stage.name}: {facts['corrected']} responses corrected, {facts['rescued']} rescued."]
    if judge["failed"]:
        notes.append(
            f"{stage.name}: no usable verdict on {judge['failed']} of {judge['asked']} pairs."
        )
    by_place, told = (
        judge["always_first"] + judge["always_second"],
        judge["asked"] - judge["failed"],
    )
    if 2 * by_place > told:
        notes.append(f"{stage.name}: the judge chose by place in {by_place} of {told} pairs.")
    return notes
