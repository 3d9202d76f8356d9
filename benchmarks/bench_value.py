"""Does curation pay? Every arm trained at equal loss tokens and steps, over seeds, with intervals.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/bench_value.py --root DIR
        [--size small|whole|other] [--seeds 3] [--only NAME]... [--workers 2] > FILE.txt

The world is the demo's: graded arithmetic word problems answered by simulated sources, with planted
defects, and a base model trained here. Arms: the base model as it is; the full pool; random rows of
the readable pool, of the clean one (deduplicated and decontaminated), and of that with as many
vanilla draws as the chain made; the default chain, the chain with each stage left out and with
other choices; and every registered selection method on the clean pool at the chain's budget.

`small` has the randoms and the chain with each stage left out, `whole` every arm of the same world.
`other` is every arm of a world with other questions, on whose corpus the same base model learns
much less: what curation can't do for a model that can't do the task.

Each arm takes the same loss tokens in the same number of steps. Rows of the random arms and of
methods that draw differ by seed; a chain's rows are one draw of the recipe's seed, so its interval
covers training and questions only. The difference to random (clean) is paired by seed and question.
Every cell is kept under --root by what decides it: an interrupted run goes on, a second is free.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

SIZES = {
    "small": ({"prompts": 450, "test": 400, "dev": 80, "target": 40, "corpus": 12000}, 5000),
    "whole": ({"prompts": 450, "test": 400, "dev": 80, "target": 40, "corpus": 12000}, 5000),
    "other": ({"prompts": 600, "test": 600, "dev": 80, "target": 40, "corpus": 12000}, 6000),
}
BASELINE = "random_clean"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def prepare(root: Path, data: dict[str, Any]) -> None:
    """Inputs, pools, base model, scores and the default chain, through the recipe's own assets."""
    import yaml

    from siftline.pipelines.execute import run_recipe
    from siftline.recipe import load
    from siftline.workspace import Workspace

    recipes = root / "recipes"  # stands before the shipped recipe of this name
    recipes.mkdir(parents=True, exist_ok=True)
    (recipes / "demo.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    os.environ["SIFTLINE_RECIPES"] = str(recipes)
    recipe = load(recipes / "demo.yaml")
    done = run_recipe(Workspace(root), recipe, (), say, select='+key:"demo/curated"')
    if not done.success:
        raise ValueError(f"the chain failed: {done.error}")


def train_and_ask(root: str, data: dict[str, Any], rows: Any, name: str, seed: int) -> Any:
    """One cell, in a process of its own: trains on the rows and answers the test questions."""
    import torch

    torch.set_num_threads(1)
    from value_arms import World

    from siftline.progress import Progress
    from siftline.stages.arms import arm_folder
    from siftline.stages.evaluation import evaluated, test_rows
    from siftline.training.finetune import finetune

    world = World(Path(root), data, say)
    recipe, workspace = world.recipe, world.workspace
    training = recipe.training
    from siftline.stages.models import model_spec

    spec = model_spec(workspace, recipe, "target")
    folder = Path(spec.path)
    if rows is not None:
        tokens = round(data["budget"]["size"] * training.epochs)
        steps = max(1, round(tokens / 30 / training.options.batch_rows))
        options = replace(training.options, loss_tokens=tokens, steps=steps)
        folder = arm_folder(
            workspace, recipe, "bench", seed, rows, options, spec.path, spec.template, None, None
        )
        finetune(
            Path(spec.path), rows, folder, options,
            seed=seed, dataset_version=name, template=spec.template,
        )  # fmt: skip
    questions = test_rows(workspace, recipe, recipe.evaluation.level_column)
    progress = Progress(f"{name} seed {seed}", questions.height, lambda line: None, "questions")
    return evaluated(workspace, recipe, folder, questions, progress)


def arms_of(world: Any, size: str) -> tuple[list[str], dict[str, str]]:
    """Names of the arms in the order of the table, and why others are not run."""
    from value_arms import RANDOMS, lacking, selectors, variants

    chains = list(variants(world.data))
    if size == "small":
        return ["full", *RANDOMS, *chains[:8]], {}
    names, without = ["full", *RANDOMS, *chains], {}
    for entry in selectors():
        missing = lacking(entry)
        if missing:
            without[entry.name] = f"reads {', '.join(missing)}, which this world has not"
        else:
            names.append(f"select {entry.name}")
    return names, without


def lines_of(results: dict[str, list[Any]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """One line per arm: accuracy, by level, and the paired difference to the baseline."""
    from siftline.training.evaluate import compare, summarise_accuracy, summarise_seeds

    lines = []
    for name, runs in results.items():
        table = summarise_seeds(runs) if len(runs) > 1 else summarise_accuracy(runs[0])
        by_level = {row["level"]: row for row in table.to_dicts()}
        overall = by_level.pop("all")
        against = None
        if len(runs) == len(results[BASELINE]) and name != BASELINE:
            found = compare(runs, results[BASELINE])
            against = [found.estimate, found.low, found.high]
        lines.append(
            {
                "arm": name,
                "accuracy": overall["accuracy"], "low": overall["low"], "high": overall["high"],
                "seeds": len(runs), "n": overall["n"], "against": against,
                "levels": {level: row["accuracy"] for level, row in by_level.items()},
                **facts.get(name, {}),
            }
        )  # fmt: skip
    return lines


def shown(lines: list[dict[str, Any]]) -> str:
    """The table as text."""
    levels = sorted({level for line in lines for level in line["levels"]})
    head = f"{'arm':<32}{'rows':>6}{'draws':>7}  accuracy (95 %)      against {BASELINE}"
    out = [head + "".rjust(8) + "".join(f"{level:>8}" for level in levels)]
    for line in lines:
        interval = "{:5.1f} ({:.1f} to {:.1f})".format(
            *(100 * line[name] for name in ("accuracy", "low", "high"))
        )
        against = "{:+5.1f} ({:+.1f} to {:+.1f})".format(
            *(100 * x for x in line["against"])
        ) if line["against"] else ""  # fmt: skip
        by_level = "".join(f"{100 * line['levels'].get(level, 0):8.1f}" for level in levels)
        rows, draws = line.get("rows", ""), line.get("draws", "")
        out.append(f"{line['arm']:<32}{rows:>6}{draws:>7}  {interval:<21}{against:<28}{by_level}")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", default=[], help="arms whose names hold this")
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    started = time.perf_counter()
    from value_arms import World, recipe_data

    root = asked.root.absolute()
    data = recipe_data(*SIZES[asked.size])
    prepare(root, data)
    world = World(root, data, say)
    names, not_run = arms_of(world, asked.size)
    if asked.only:
        names = [n for n in names if n == BASELINE or any(part in n for part in asked.only)]
    seeds = range(asked.seeds)
    facts: dict[str, Any] = {}
    cells: dict[str, list[Any]] = {}
    with ProcessPoolExecutor(asked.workers, mp_context=get_context("spawn")) as pool:
        cells["zero-shot"] = [pool.submit(train_and_ask, str(root), data, None, "zero-shot", 0)]
        for name in names:
            for seed in seeds:
                fixed = name.startswith("chain") or name == "full"
                if seed == 0 or not fixed:
                    rows, cost = world.arm(name, seed)
                facts.setdefault(name, cost)
                cell = pool.submit(train_and_ask, str(root), data, rows, name, seed)
                cells.setdefault(name, []).append(cell)
            say(f"{time.perf_counter() - started:6.0f} s  {name}: {facts[name]['rows']} rows")
            for cell in (c for runs in cells.values() for c in runs if c.done()):
                cell.result()  # an arm that fails stops the table now, not at its end
        results = {name: [cell.result() for cell in runs] for name, runs in cells.items()}
    lines = lines_of(results, facts)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    ).stdout.strip()
    sizes, budget = SIZES[asked.size]
    print(f"bench_value.py --size {asked.size} --seeds {asked.seeds}, {date.today()}, {commit}")
    print(f"{json.dumps(sizes)}; budget {budget} loss tokens, trained 3 times")
    print(f"{time.perf_counter() - started:.0f} s in this call, {os.cpu_count()} CPUs\n")
    print(shown(lines))
    for name, why in not_run.items():
        print(f"not run: {name} {why}")
    (root / f"value_{asked.size}.json").write_text(json.dumps(lines, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
