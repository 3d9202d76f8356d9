"""Does curation pay? Every arm trained at equal loss tokens and steps, over seeds, with intervals.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/bench_value.py --root DIR
        [--size small|whole|other|large] [--seeds 3] [--only NAME]... [--workers 2]
        [--method package.module:Class]... > FILE.txt
    .venv/bin/python benchmarks/bench_value.py --root DIR --world one|two [--hours 1] [--threads 2]
        [--seeds 3] [--only NAME]... [--small]

With --world it is one of the two worlds of examples/smollm2, on a real pretrained model and real
data (see value_real.py); it stops when the hours are over and goes on where it stopped.

Else the world is the demo's: graded arithmetic word problems answered by simulated sources, with
planted defects, and a base model trained here. Arms: the base model as it is; the full pool; random
rows of the readable pool, of the clean one (deduplicated and decontaminated), and of that with as
many vanilla draws as the chain made; the default chain, the chain with each stage left out and with
other choices; every selection method of siftline, those that installed packages register (entry
points `siftline.selectors`) and those given by --method, on the clean pool at the chain's budget.

`small` has the randoms and the chain with each stage left out, `whole` every arm of the same world.
`other` is every arm of a world with other questions, on whose corpus the same base model learns
much less: what curation can't do for a model that can't do the task. `large` is every arm of a
world ten times as big with a larger base model, for a machine with a GPU. NOT MEASURED: no table of
it exists yet, and its sizes are a guess.

Each arm takes the same loss tokens in the same number of steps. Rows of the random arms and of
methods that draw differ by seed; a chain's rows are one draw of the recipe's seed, so its interval
covers training and questions only. The difference to random (clean) is paired by seed and question.
Every cell is kept under --root by what decides it: an interrupted run goes on, a second is free,
and arms of the same rows share one. An arm that fails stops the table; cells in training end first.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

LARGE = {"hidden": 256, "layers": 6, "heads": 8, "steps": 20000, "batch_tokens": 5120}
SIZES: dict[str, tuple[dict[str, int], int, dict[str, Any]]] = {
    "small": ({"prompts": 450, "test": 400, "dev": 80, "target": 40, "corpus": 12000}, 5000, {}),
    "whole": ({"prompts": 450, "test": 400, "dev": 80, "target": 40, "corpus": 12000}, 5000, {}),
    "other": ({"prompts": 600, "test": 600, "dev": 80, "target": 40, "corpus": 12000}, 6000, {}),
    "large": (
        {"prompts": 4500, "test": 2000, "dev": 400, "target": 200, "corpus": 120000}, 50000, LARGE
    ),
}  # fmt: skip
"""World, budget in loss tokens, and what the base model has unlike the demo's, by --size."""
BASELINE = "random_clean"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def prepare(root: Path, data: dict[str, Any]) -> None:
    """Inputs, pools, base model, scores and the default chain, through the recipe's own assets."""
    import yaml

    from siftline.pipelines.execute import run_recipe
    from siftline.recipe.parse import load
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


def arms_of(world: Any, size: str, own: list[str]) -> tuple[list[str], dict[str, str]]:
    """Names of the arms in the order of the table, and why others are not run."""
    from value_arms import RANDOMS, chains, lacking, selectors

    from siftline.selectors.registry import METHODS

    names, without = ["full", *RANDOMS, *chains(world.data)], {}
    if size == "small":
        names = names[: names.index("chain, uniform targets")]
    for entry in selectors(own)[len(METHODS) if size == "small" else 0 :]:
        missing = lacking(entry)
        if missing:
            without[entry.name] = f"reads {', '.join(missing)}, which this world has not"
        else:
            names.append(f"select {entry.name}")
    return names, without


@contextmanager
def workers(count: int) -> Iterator[Executor]:
    """Processes; where the body fails, what waits is dropped and only what runs is waited for."""
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class Cells:
    """Trainings by what decides them, so that no two write one folder."""

    def __init__(self, submit: Callable[[Any, str, int], "Future[Any]"]) -> None:
        self.submit = submit
        self.found: dict[tuple[int, tuple[str, ...]], Future[Any]] = {}

    def of(self, rows: Any, name: str, seed: int) -> "Future[Any]":
        """The training on some rows (None for none) with a seed, submitted once."""
        key = (seed, () if rows is None else tuple(sorted(rows["id"].to_pylist())))
        if key not in self.found:
            self.found[key] = self.submit(rows, name, seed)
        return self.found[key]

    def check(self) -> None:
        """Raises what a finished one raised."""
        for cell in self.found.values():
            if cell.done():
                cell.result()


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
    parser.add_argument("--method", action="append", default=[], help="package.module:Class")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--world", choices=["one", "two"], help="of examples/smollm2")
    parser.add_argument("--hours", type=float, default=1.0, help="begin no cell after them")
    parser.add_argument("--minutes", type=float, help="the same in minutes")
    parser.add_argument("--threads", type=int, default=2, help="of a training in a --world")
    parser.add_argument("--small", action="store_true", help="a --world of a few rows: no result")
    asked = parser.parse_args()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    ).stdout.strip()
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if asked.world:
        import value_real

        value_real.run(asked, commit)
        return
    started = time.perf_counter()
    from value_arms import World, chains, recipe_data

    root = asked.root.absolute()
    data = recipe_data(*SIZES[asked.size])
    prepare(root, data)
    world = World(root, data, say)
    names, not_run = arms_of(world, asked.size, asked.method)
    if asked.only:
        names = [n for n in names if n == BASELINE or any(part in n for part in asked.only)]
    seeds = range(asked.seeds)
    facts: dict[str, Any] = {}
    fixed = {"full", *chains(data)}
    with workers(asked.workers) as pool:
        trained = Cells(lambda *cell: pool.submit(train_and_ask, str(root), data, *cell))
        runs = {"zero-shot": [trained.of(None, "zero-shot", 0)]}
        for name in names:
            for seed in seeds:
                if seed == 0 or name not in fixed:
                    rows, cost = world.arm(name, seed)
                facts.setdefault(name, cost)
                runs.setdefault(name, []).append(trained.of(rows, name, seed))
            say(f"{time.perf_counter() - started:6.0f} s  {name}: {facts[name]['rows']} rows")
            trained.check()
        for cell in as_completed(trained.found.values()):
            cell.result()  # an arm that fails stops the table now, not at its turn
        results = {name: [cell.result() for cell in cells] for name, cells in runs.items()}
    lines = lines_of(results, facts)
    sizes, budget, _ = SIZES[asked.size]
    print(f"bench_value.py --size {asked.size} --seeds {asked.seeds}, {date.today()}, {commit}")
    print(f"{json.dumps(sizes)}; budget {budget} loss tokens, trained 3 times")
    print(f"{time.perf_counter() - started:.0f} s in this call, {os.cpu_count()} CPUs\n")
    print(shown(lines))
    for name, why in not_run.items():
        print(f"not run: {name} {why}")
    (root / f"value_{asked.size}.json").write_text(json.dumps(lines, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
