"""The table of a world of value_real.py: arms over the seeds that are in, differences, costs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

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
    """What the chain's stages made of each planted defect; opens the truth, after the run."""
    truth = arena.workspace.truth(arena.recipe.name) / "rows.jsonl"
    known = pl.read_ndjson(truth, infer_schema_length=None).select("id", "defect")
    known = known.with_columns(pl.col("defect").cast(pl.String).fill_null("sound"))
    if known["defect"].n_unique() == 1:
        return []
    said = []
    for stage, output in outputs_so_far(arena.workspace, arena.recipe):
        gone = output.all_decisions().filter(pl.col("outcome") == "removed")["id"]
        known = known.with_columns(pl.col("id").is_in(gone.to_list()).alias(stage.name))
        said.append(stage.name)
    head = f"{'planted':<26}{'rows':>6}" + "".join(f"{name:>16}" for name in said)
    lines = [head + f"{'kept':>8}"]
    for (defect,), part in known.sort("defect").group_by("defect", maintain_order=True):
        counts = [int(part[name].sum()) for name in said]
        row = f"{defect:<26}{part.height:>6}" + "".join(f"{c:>16}" for c in counts)
        lines.append(row + f"{part.height - sum(counts):>8}")
    return lines
