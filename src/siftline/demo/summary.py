"""Adds to a demo run's summary what was planted and what the gates made of it.

This is the only code outside tests that opens the truth, and it runs after the chain has ended.

What the gates caught of the planted defects, and what they removed wrongly.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Recipe
from siftline.rows.ledger import FAILED, KEPT, StageOutput
from siftline.stages.evaluation import evaluate_arms
from siftline.stages.reporting import write_report
from siftline.stages.run import outputs
from siftline.workspace import Workspace

OVERLAPS = frozenset({"overlaps_test", "overlaps_dev", "overlaps_target"})
DOUBTED = frozenset({"low_confidence", "likelihood_outlier_low", "likelihood_outlier_high"})
ACCEPTED: dict[str, frozenset[str]] = {
    "exact_duplicate": frozenset({"exact_duplicate", "near_duplicate"}),
    "near_duplicate": frozenset({"near_duplicate"}),
    "wrong_vs_reference": frozenset({"wrong_answer"}) | DOUBTED,
    "wrong_with_reference": DOUBTED,
    "wrong_without_reference": DOUBTED,
    "truncated": frozenset({"no_final_answer", "wrong_answer"}) | DOUBTED,
    "off_topic": frozenset({"no_final_answer"}) | DOUBTED,
    "leaked_test": OVERLAPS,
    "conflict": frozenset({"wrong_answer"}) | DOUBTED,
}
"""The reasons that count as catching a defect."""
COPIES = ("exact_duplicate", "near_duplicate")
CHARGED = {
    "exact_duplicate": "exact_duplicate",
    "near_duplicate": "near_duplicate",
    "wrong_answer": "wrong_vs_reference",
    "low_confidence": "wrong_with_reference",
    "no_final_answer": "truncated",
    "likelihood_outlier_low": "off_topic",
    "likelihood_outlier_high": "off_topic",
    "overlaps_test": "leaked_test",
    "overlaps_dev": "leaked_test",
    "overlaps_target": "leaked_test",
}
"""The defect a reason mainly looks for: under it stand the clean rows the reason removed."""


def audit(truth_dir: Path, decisions: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Holds the gates' removals against the truth.

    Args:
        truth_dir: Folder with the generator's rows.jsonl.
        decisions: Columns stage, kind, id, kept, reason; one line per stage and row. Rows that the
            truth does not know (added by rejection sampling) are left out.

    Returns:
        Per defect, in the order of `ACCEPTED`: `planted` (rows), `caught` (rows removed by a gate
        for a matching reason) and `wrongly_removed` (clean rows removed for a reason in `CHARGED`
        to the defect; reasons charged to none stand under `other`).

    Raises:
        ValueError: if the truth is missing or names a defect that is not in `ACCEPTED`.
    """
    truth = read_truth(truth_dir)
    removed = _gate_removals(decisions, truth)
    planted: Counter[str] = Counter(row["defect"] for row in truth.values() if row["defect"])
    caught: Counter[str] = Counter(
        row["defect"] for row in truth.values() if row["defect"] and _hits(row, removed)
    )
    wrongly: Counter[str] = Counter()
    for reason, count in _wrong_by_reason(truth, removed).items():
        wrongly[CHARGED.get(reason, "other")] += count
    return {
        defect: {
            "planted": planted[defect],
            "caught": caught[defect],
            "wrongly_removed": wrongly[defect],
        }
        for defect in (*ACCEPTED, "other")
        if planted[defect] or wrongly[defect]
    }


def wrong_removals(truth_dir: Path, decisions: pl.DataFrame) -> dict[str, int]:
    """Clean rows that gates removed, counted by reason; see `audit`."""
    truth = read_truth(truth_dir)
    return _wrong_by_reason(truth, _gate_removals(decisions, truth))


def _hits(row: dict[str, Any], removed: dict[str, str]) -> list[str]:
    """The rows whose removal catches the defect of `row`."""
    pair = [row["id"], row["twin"]] if row["defect"] in COPIES else [row["id"]]
    return [identity for identity in pair if removed.get(identity) in ACCEPTED[row["defect"]]]


def _wrong_by_reason(truth: dict[str, dict[str, Any]], removed: dict[str, str]) -> dict[str, int]:
    excused = {i for row in truth.values() if row["defect"] for i in _hits(row, removed)}
    return dict(
        sorted(
            Counter(
                reason
                for identity, reason in removed.items()
                if truth[identity]["defect"] is None and identity not in excused
            ).items()
        )
    )


def read_truth(truth_dir: Path) -> dict[str, dict[str, Any]]:
    """Reads rows.jsonl by id.

    Raises:
        ValueError: if there is none, or it names a defect that is not in `ACCEPTED`.
    """
    path = truth_dir / "rows.jsonl"
    if not path.is_file():
        raise ValueError(f"no truth at {path}: name the folder that the generator wrote it to")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    unknown = {row["defect"] for row in rows} - {None, *ACCEPTED}
    if unknown:
        raise ValueError(f"{path} has unknown defects {sorted(unknown)}: add them to ACCEPTED")
    return {row["id"]: row for row in rows}


def _gate_removals(decisions: pl.DataFrame, truth: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Reason by id of the known rows that a gate removed; a row leaves the chain only once."""
    gone = decisions.filter((pl.col("kind") == "gate") & ~pl.col("kept"))
    return {i: reason for i, reason in gone.select("id", "reason").iter_rows() if i in truth}


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
