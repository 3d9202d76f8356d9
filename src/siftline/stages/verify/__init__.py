"""Verify: responses with an independent answer are held to it."""

from collections.abc import Mapping
from typing import Any

from siftline.recipe.kinds import Stage, StageKind
from siftline.stages.verify.decide import Verify


def notes(stage: Stage, facts: Mapping[str, Any]) -> list[str]:
    """Rows whose verdict is open: neither right nor wrong, and what became of them."""
    said = []
    for reason, words in (
        ("unreadable", "can't be read"),
        ("no_final_answer", "have no final answer"),
        ("verifier_error", "made the verifier fail"),
    ):
        gone, kept = facts.get(reason, 0), facts.get("kept_open", {}).get(reason, 0)
        if gone or kept:
            fate = "kept" if kept else "failed" if reason == "verifier_error" else "removed"
            said.append(f"{gone + kept} {words} ({fate})")
    checked = facts.get("checked", 0)
    return (
        [f"{stage.name}: of {checked} rows checked, {', '.join(said)}: open verdicts."]
        if said
        else []
    )


KIND = StageKind(
    name="verify",
    role="gate",
    options=Verify,
    run="siftline.stages.verify.run:run",
    planted=("swapped_answer", "truncated", "one_number", "gold_answer"),
    notes=notes,
)
