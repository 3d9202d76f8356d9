"""Adds to a demo run's summary what was planted and what the gates made of it.

This is the only code outside tests that opens the truth, and it runs after the chain has ended.
"""

from pathlib import Path
from typing import Any

import polars as pl

from siftline.demo.audit import ACCEPTED, audit
from siftline.ledger import FAILED, KEPT, StageOutput
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Recipe
from siftline.stages.evaluation import evaluate_arms
from siftline.stages.reporting import write_report
from siftline.stages.run import outputs
from siftline.workspace import Workspace


def gate_decisions(done: list[tuple[Stage, StageOutput]]) -> pl.DataFrame:
    """Decisions of all stages as `audit` reads them: stage, kind, id, kept, reason.

    Failed rows are left out: a gate that could not decide has removed nothing.
    """
    return pl.concat(
        output.all_decisions()
        .filter(pl.col("outcome") != FAILED)
        .select(
            pl.lit(stage.name).alias("stage"),
            pl.lit(stage.of.role).alias("kind"),
            "id",
            (pl.col("outcome") == KEPT).alias("kept"),
            "reason",
        )
        for stage, output in done
    )


def audited(workspace: Workspace, recipe: Recipe, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with `planted`, and a report page that shows it.

    Args:
        workspace: The root.
        recipe: A recipe whose generator wrote a truth file.
        summary: What `siftline run` prints.
    """
    done = outputs(workspace, recipe)
    planted = audit(workspace.truth(recipe.name), gate_decisions(done))
    accuracy, arms = evaluate_arms(workspace, recipe, lambda line: None)
    lines = [
        {
            "defect": defect,
            "stage": ", ".join(sorted(ACCEPTED.get(defect, ()))),
            "planted": counts["planted"],
            "caught": counts["caught"],
            "false_drops": counts["wrongly_removed"],
        }
        for defect, counts in planted.items()
    ]
    page = Path(summary["report"])
    audited_page, _ = write_report(
        workspace, recipe, accuracy, arms, pl.DataFrame(lines), suffix="-audited"
    )
    assert audited_page.parent == page.parent
    return {**summary, "report": str(audited_page), "planted": planted}
