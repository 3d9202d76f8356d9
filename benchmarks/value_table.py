"""The table of a world of value_real.py: arms over the seeds that are in, differences, costs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from siftline.rows.ledger import REMOVED
from siftline.stages.run import outputs_so_far
from siftline.training.evaluate import compare, summarise_accuracy, summarise_seeds

BASELINES = ("random_clean", "select balanced_random", "full", "zero-shot")


@dataclass(frozen=True)
class Answered:
    """What a cell left: its graded answers and what it took."""

    frame: pl.DataFrame
    facts: dict[str, Any]


def read(file: Path) -> Answered:
    found = json.loads(file.read_text(encoding="utf-8"))
    frame = pl.DataFrame(found["answers"], infer_schema_length=None)
    return Answered(frame, {k: v for k, v in found.items() if k != "answers"})


def judged(frame: pl.DataFrame) -> pl.DataFrame:
    """The answers that count: not those to questions the pool was planted with."""
    return frame.filter(pl.col("level").ne_missing("leaked"))


def table(arena: Any, names: list[str], seeds: int, options: Any) -> list[str]:
    """Lines of the arms that have answers, each over the seeds that are in."""
    runs: dict[str, list[Answered]] = {}
    for name in names:
        for seed in range(1 if name == "zero-shot" else seeds):
            got = arena.listed(name, seed, options)
            if got is None:
                break
            runs.setdefault(name, []).append(got)
    frames = {n: [judged(a.frame) for a in found] for n, found in runs.items()}
    if "zero-shot" in frames:  # greedy: the same for every seed
        frames["zero-shot"] *= max(map(len, frames.values()))
    there = {name: frames[name] for name in BASELINES if name in frames}
    pool_tokens = arena.pool_tokens()
    head = f"{'arm':<34}{'seeds':>6}{'rows':>6}{'good %':>8}{'seen':>6}{'tokens':>8}  "
    head += f"{'accuracy (95 %)':<22}"
    lines = [head + "".join(f"{'- ' + n:<27}" for n in there) + "leaked  select s   tokens train s"]
    for name, parts in frames.items():
        found, facts = runs[name], runs[name][0].facts
        text = f"{name:<34}{len(found):>6}{facts.get('rows', 0):>6}"
        good = facts.get("good")
        text += f"{'' if good is None else f'{100 * good:.0f}':>8}{facts.get('seen', 0):>6}"
        text += f"{facts.get('loss_tokens', 0):>8}  {_accuracy(parts[: len(found)]):<22}"
        text += "".join(
            f"{_against(parts, other) if n != name else '':<27}" for n, other in there.items()
        )
        known = [a.frame.filter(pl.col("level") == "leaked")["correct"].to_list() for a in found]
        leaked = f"{100 * sum(map(sum, known)) / sum(map(len, known)):.0f}" if known[0] else ""
        seconds = sum(a.facts["training_seconds"] for a in found) / len(found)
        spent, tokens = arena.cost(name, pool_tokens)
        lines.append(f"{text}{leaked:>6}{spent:>10.0f}{tokens:>9}{seconds:>8.0f}")
    return lines


def _accuracy(runs: list[pl.DataFrame]) -> str:
    """Mean accuracy over seeds with its interval; Wilson's where there is one run."""
    found = summarise_seeds(runs) if len(runs) > 1 else summarise_accuracy(runs[0])
    line = found.filter(level="all").to_dicts()[0]
    return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * line[k] for k in ("accuracy", "low", "high")))


def _against(runs: list[pl.DataFrame], other: list[pl.DataFrame]) -> str:
    """Difference over the seeds that both have, paired by seed and question."""
    n = min(len(runs), len(other))
    found = compare(runs[:n], other[:n])
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(
        *(100 * x for x in (found.estimate, found.low, found.high))
    )


def caught(arena: Any) -> list[str]:
    """What the chain's stages made of each planted defect; opens the truth, after the run.

    Of a copy and its original either may go: the one that went is counted as the copy.
    """
    truth = arena.workspace.truth(arena.recipe.name) / "rows.jsonl"
    rows = [json.loads(line) for line in truth.read_text(encoding="utf-8").splitlines()]
    defects = {row["id"]: row["defect"] or "sound" for row in rows}
    if set(defects.values()) == {"sound"}:
        return []
    gone = {
        stage.name: set(output.all_decisions().filter(outcome=REMOVED)["id"].to_list())
        for stage, output in outputs_so_far(arena.workspace, arena.recipe)
    }
    for row in rows:
        lost = [i for i in (row["id"], row["twin"]) if i in gone.get("duplicates", ())]
        if row["defect"] == "near_duplicate" and lost == [row["twin"]]:
            defects[row["id"]], defects[row["twin"]] = "sound", "near_duplicate"
    lines = [f"{'planted':<26}{'rows':>6}" + "".join(f"{n:>16}" for n in gone) + f"{'kept':>8}"]
    for defect in sorted(set(defects.values())):
        ids = {i for i, found in defects.items() if found == defect}
        counts = [len(ids & removed) for removed in gone.values()]
        line = f"{defect:<26}{len(ids):>6}" + "".join(f"{count:>16}" for count in counts)
        lines.append(f"{line}{len(ids) - sum(counts):>8}")
    return lines
