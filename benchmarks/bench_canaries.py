"""What canaries cost: three gates that ask no model, with and without them, on one pool.

    .venv/bin/python benchmarks/bench_canaries.py [--rows 100000] [--rounds 3]

The gates are duplicates, decontamination and verify; quality_rules is not among them. Rows are word
problems from a template with an independent answer; a tenth of them are copied with
words at the ends, and 200 evaluation rows are of the same kind. Each round runs every gate without
and with canaries (200 of each kind), in turns, its output removed before. Seconds are medians; the
share is what canaries add to the sum. Decisions must be equal.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

GATES = ("duplicates", "decontamination", "verify")
THINGS = ("pens", "apples", "coins", "stamps", "marbles", "ribbons", "shells", "buttons", "cards")
NAMES = ("Tom", "Ana", "Ravi", "Mei", "Lena", "Omar", "Ida", "Jun", "Eva", "Noa", "Kofi", "Sara")
PLACES = ("market", "school", "harbour", "museum", "library", "station", "garden", "bakery")


def problem(rng: random.Random) -> dict[str, str]:
    """One word problem with its solution and answer."""
    a, b, c = rng.randrange(20, 900), rng.randrange(2, 300), rng.randrange(2, 12)
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    question = (
        f"{name} brings {a} {thing} to the {place} and finds {b} more there. Then {name} packs "
        f"all the {thing} into bags of {c}. How many {thing} has {name} brought and found?"
    )
    response = f"{name} has {a} + {b} = {a + b} {thing}, in bags of {c}.\n#### {a + b}"
    return {"question": question, "response": response, "answer": str(a + b), "source": thing}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def recipe_data(folder: Path, canaries: bool) -> dict[str, Any]:
    """Three gates over the two files."""

    def pool(name: str, buckets: int) -> dict[str, Any]:
        columns = {c: c for c in ("question", "response", "answer", "source")}
        file = {"path": str(folder / f"{name}.jsonl"), "columns": columns}
        return {"name": name, "buckets": buckets, "inputs": [file]}

    return {
        "name": "canaries",
        "pool": pool("pool", 16),
        "sets": {"test": [pool("held_out", 1)]},
        "models": {"none": {"path": "/nowhere"}},
        "stages": list(GATES),
        "budget": {"size": 1000, "unit": "rows"},
        **({"canaries": {"per_kind": 200}} if canaries else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    from siftline.ingest.pool import build_pool
    from siftline.recipe.parse import parse
    from siftline.stages.run import run_stage
    from siftline.workspace import Workspace

    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = [problem(rng) for _ in range(asked.rows * 10 // 11)]
        copies = [{**r, "question": f"{r['question']} Thanks."} for r in rows[: asked.rows // 11]]
        write(folder / "pool.jsonl", rows + copies)
        write(folder / "held_out.jsonl", [problem(rng) for _ in range(200)])
        workspace = Workspace(folder / "root")
        recipes = {on: parse(recipe_data(folder, on)) for on in (False, True)}
        plain = recipes[False]
        for spec in (plain.pool, *plain.sets.test):
            build_pool(workspace.pool(spec.name), spec, lambda rows: None)
        seconds: dict[tuple[str, bool], list[float]] = {}
        said, versions = [], {}
        for turn in range(asked.rounds):
            for on in (False, True) if turn % 2 else (True, False):
                shutil.rmtree(workspace.root / "stages", ignore_errors=True)
                for gate in GATES:
                    started = time.perf_counter()
                    output, _ = run_stage(workspace, recipes[on], gate, lambda line: None)
                    seconds.setdefault((gate, on), []).append(time.perf_counter() - started)
                    known = versions.setdefault(gate, output.manifest.version)
                    assert known == output.manifest.version, f"canaries changed {gate}"
                    if on and not turn:
                        said += [(gate, line) for line in output.facts["canaries"]]
                print(f"round {turn + 1}, canaries {on}", file=sys.stderr, flush=True)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    ).stdout.strip()
    print(f"bench_canaries.py --rows {asked.rows}, {date.today()}, {commit}, {os.cpu_count()} CPUs")
    totals = {False: 0.0, True: 0.0}
    for gate in GATES:
        medians = {on: statistics.median(seconds[gate, on]) for on in (False, True)}
        for on, value in medians.items():
            totals[on] += value
        print(f"{gate:<16} without {medians[False]:7.2f} s   with {medians[True]:7.2f} s")
    added = totals[True] / totals[False] - 1
    print(f"{'sum':<16} without {totals[False]:7.2f} s   with {totals[True]:7.2f} s   {added:+.1%}")
    for gate, line in said:
        what = "dropped" if line["sound"] else "caught"
        print(
            f"{gate:<16} {line['kind']:<16} {what} {line['removed']} of {line['planted']} "
            f"({100 * line['low']:.1f} to {100 * line['high']:.1f} %)"
        )


if __name__ == "__main__":
    main()
