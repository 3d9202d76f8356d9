"""What a gate decided about every bucket, as one output."""

from typing import Any

import polars as pl

from siftline.selectors.selection import Selection
from siftline.stages.context import Context, StageRun, pass_earlier, split_failed

UNDECIDED = ["verifier_error"]
"""Reasons that say the gate could not decide: such rows fail and are tried again."""


def gather(context: Context, selections: list[Selection], facts: dict[str, Any]) -> StageRun:
    """Joins the selections of all buckets; side tables are stacked."""
    names = sorted({name for selection in selections for name in selection.tables})
    stacked = {
        name: pl.concat([s.tables[name] for s in selections if name in s.tables]) for name in names
    }
    results = []
    for bucket, selection in enumerate(selections):
        decided = pass_earlier(selection, context.judged(bucket))
        results.append(split_failed(*without_undecided(decided)))
    vacuous = all(selection.vacuous for selection in selections)
    return StageRun(results, stacked, {**facts, "vacuous": vacuous})


def without_undecided(decided: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, str]]:
    """Decisions, and reasons by id of the rows that could not be decided."""
    open_ = pl.col("reason").is_in(UNDECIDED).fill_null(False)
    lost = decided.filter(open_)["id"].to_list()
    return decided.filter(~open_), dict.fromkeys(lost, UNDECIDED[0])
