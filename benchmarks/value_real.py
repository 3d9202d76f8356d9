"""The two worlds of examples/smollm2: their arms, one training and evaluation each, and the table.

Every cell (an arm with a seed) is a file below ROOT/results, named by what decides it: so a run
that was killed goes on, another piece of it does the next cells, and arms of the same rows share
one. The weights of a cell go when its questions are answered.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from value_arms import World, lacking, selecting, selectors, without
from value_table import Answered, caught, judged, read, table

from siftline.ingest.pool import Pool
from siftline.recipe.parse import parse
from siftline.rows import shards
from siftline.rows.verified import content_hash
from siftline.scoring.fingerprint import directory_digest
from siftline.selectors.registry import find
from siftline.stages.arms import COLUMNS, HYGIENE, offer, rows_of_arm
from siftline.stages.models import model_spec
from siftline.stages.run import outputs
from siftline.training.evaluate import evaluate
from siftline.training.schedule import rows_for_budget, tokenize_rows

EXAMPLES = Path(__file__).parents[1] / "examples"
WORLDS = {"one": "choosing", "two": "dirt"}
ROWS_ARM, TARGET_ARM, PROVEN_ARM = "random, as many rows", "target rows only", "proven rows only"
WITHOUT = "chain without "
FIRST = ("select perplexity", "select rds_plus")
"""Rows found before all others, so that the cost of each kind of score is seen by itself."""
SHORT = 3
"""Loss tokens of an answer in the wanted tasks, about."""
STEPS = 40
"""Optimizer steps of every arm but `full`, which takes rows / batch_rows a pass."""
CANDIDATES: tuple[dict[str, Any], ...] = (
    {"method": "lora", "learning_rate": 1e-3},
    {"method": "lora", "learning_rate": 3e-4},
    {"method": "full", "learning_rate": 1e-4},
)
"""What is tried on dev, on `TRIED`, with the first seed."""
TRIED = ("random_clean", "select nearest_words")
COSTLY = {"less": {"gradients": {"dimensions": 1024, "epochs": 2}}}
"""An eighth of the default's width and half its checkpoints; one draw for all seeds."""
NOT_RUN = {
    "kmeans_quality_rounds": "trains a model a round",
    "best_fit": "chooses among several answers to a prompt, and each has one here",
}
PASSES = {"likelihood": 1.0, "embeddings": 1.0, "gradients": 6.0, "confidence": 1.0}
"""Forward passes over the pool by kind of score: gradients take a backward pass, worth two, at each
of `COSTLY`'s two checkpoints; samples share the pass over their prompt."""
WANTED = ("task1386", "task1516", "task039", "task738", "task937")
SOUND = (None, "near_duplicate", "leaked_test")
"""Defects of rows whose answer is right."""
VERSION = 1


class Cell(NamedTuple):
    """One training and evaluation."""

    arm: str
    seed: int
    rows: pa.Table | None
    asked: Any
    """Training options of the table."""
    training: Any
    """Those of this arm; None for the model as it is."""
    split: str = "test"


def stage_kinds(data: dict[str, Any]) -> list[str]:
    """Kinds of the stages of a recipe."""
    return [stage.kind for stage in parse(data).stages]


def arms_of(data: dict[str, Any], own: list[str]) -> tuple[list[str], dict[str, str]]:
    """Names of the arms in the order they are run, and why methods are not."""
    kinds = stage_kinds(data)
    names = ["zero-shot", "full", "random", "random_clean", ROWS_ARM, TARGET_ARM, "chain"]
    names += [PROVEN_ARM] if "verify" in kinds else []
    left_out = dict(NOT_RUN)
    for entry in selectors(own):
        if lacking(entry):
            left_out[entry.name] = f"reads {', '.join(lacking(entry))}, which this world has not"
        elif entry.name not in left_out and entry.name != "random":  # that is random_clean
            names.append(f"select {entry.name}")
    gates = [k for k in kinds if k not in ("allocate", "select")]
    names += [f"{WITHOUT}{kind}" for kind in gates]
    return sorted(names, key=lambda name: name == "select less"), left_out  # hours: the last


class Arena:
    """One world: its inputs, the rows of arms, and the cells that are kept."""

    def __init__(
        self, root: Path, world: str, threads: int, say: Callable[[str], None], small: bool = False
    ) -> None:
        self.name, self.say = WORLDS[world], say
        self.root, self.threads = root, threads
        self.results = root / "results" / self.name
        self.results.mkdir(parents=True, exist_ok=True)
        path = EXAMPLES / "smollm2" / f"{self.name}.yaml"
        self.data = yaml.safe_load(path.read_text(encoding="utf-8"))
        if small:  # tries the machinery, measures nothing
            self.data["inputs"]["args"] |= {"per_task": 8, "test": 3, "dev": 2, "target": 2}
            self.data["budget"]["size"] = 40
        self.steps = 2 if small else STEPS
        self.candidates = CANDIDATES[:1] if small else CANDIDATES
        self.recipe = parse(self.data)
        self._prepare()
        self.world = World(root / "work", self.data, say)
        self.world.chain({**self.data, "stages": list(HYGIENE)})  # what the random arms stand on
        self.chosen: dict[tuple[str, int], pa.Table] = {}

    # ---- inputs ------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Inputs and pools by the functions that the recipe's assets call."""
        from siftline.assets.shared import build, generate_inputs
        from siftline.workspace import Workspace

        workspace = Workspace(self.root / "work")
        generate_inputs(workspace, self.recipe)
        for spec in (self.recipe.pool, *(spec for _, spec in self.recipe.sets.items())):
            build(workspace, self.recipe, spec.name, lambda line: None)
        self.workspace = workspace

    def leaked(self) -> set[str]:
        """Test questions that are planted in the pool: nobody is judged by them."""
        truth = self.workspace.truth(self.recipe.name) / "rows.jsonl"
        lines = map(json.loads, truth.read_text(encoding="utf-8").splitlines())
        return {line["question"] for line in lines if line["defect"] == "leaked_test"}

    def good(self, rows: pa.Table) -> float | None:
        """Share of rows worth taking: of a wanted task, or rightly answered; None for set rows."""
        truth = self.workspace.truth(self.recipe.name) / "rows.jsonl"
        known = {}
        for line in map(json.loads, truth.read_text(encoding="utf-8").splitlines()):
            wanted = (
                line["source"] in WANTED if self.name == "choosing" else line["defect"] in SOUND
            )
            known[line["id"]] = wanted
        told = [known[i] for i in rows["id"].to_pylist() if i in known]
        return sum(told) / len(told) if told else None

    def questions(self, split: str) -> pl.DataFrame:
        """Questions of the test or the dev set, with `leaked` as their level where they are."""
        from siftline.stages.evaluation import test_rows

        asked = {**self.data, "sets": {"test": self.data["sets"][split]}}
        found = test_rows(self.workspace, parse({**asked, "stages": ["allocate"]}), "level")
        leaked = self.leaked()
        prompts = [messages[0]["content"] for messages in found["messages"].to_list()]
        known = pl.Series([prompt in leaked for prompt in prompts])
        level = pl.when(known).then(pl.lit("leaked")).otherwise(pl.col("level")).alias("level")
        return found.with_columns(level)

    # ---- rows --------------------------------------------------------------------------------

    def rows(self, arm: str, seed: int) -> pa.Table | None:
        """Rows of an arm; None for the model as it is."""
        if arm == "zero-shot":
            return None
        fixed = arm in ("full", TARGET_ARM, PROVEN_ARM, "select less") or arm.startswith("chain")
        key = (arm, 0 if fixed else seed)
        if key not in self.chosen:
            self.say(f"rows of {arm}, seed {key[1]}")
            started = time.perf_counter()
            self.chosen[key] = self._rows(*key)
            self.note_cost(arm, time.perf_counter() - started)
        return self.chosen[key]

    def _rows(self, arm: str, seed: int) -> pa.Table:
        if arm == TARGET_ARM:
            sets = [Pool(self.workspace.pool(spec.name)) for spec in self.recipe.sets.target]
            return pa.concat_tables(pool.all_rows(COLUMNS) for pool in sets)
        if arm == PROVEN_ARM:
            return self._proven()
        if arm == "chain":
            return self.world.chain(self.data)[0]
        if arm.startswith(WITHOUT):
            return self.world.chain(without(self.data, arm.removeprefix(WITHOUT)))[0]
        if arm.startswith("select "):
            method = arm.removeprefix("select ")
            data = selecting(self.data, method, seed)
            data["stages"][-1]["select"].update(COSTLY.get(method, {}))
            return self.world.chain(data)[0]
        if arm == ROWS_ARM:
            return self._as_many_rows(seed)
        clean = parse({**self.data, "stages": list(HYGIENE)})
        return rows_of_arm(self.workspace, clean, arm, self.world.draw, seed, self.say).rows

    def _as_many_rows(self, seed: int) -> pa.Table:
        """As many random clean rows as the budget holds short answers, whatever they cost."""
        clean = parse({**self.data, "stages": list(HYGIENE)})
        rows = offer(self.workspace, clean, "random_clean", self.say).rows
        ones = np.ones(rows.num_rows, dtype=np.int64)
        wanted = min(rows.num_rows, self.recipe.budget.size // SHORT)
        taken = rows_for_budget(rows["id"].to_pylist(), ones, wanted, seed)
        return rows.filter(pc.is_in(rows["id"], pa.array(sorted(set(taken)), pa.string())))

    def _proven(self) -> pa.Table:
        """Rows that the chain's `verify` held against a reference answer and found right."""
        before = stage_kinds(self.data)
        data = {**self.data, "stages": self.data["stages"][: before.index("verify") + 1]}
        rows = self.world.chain(data)[0]
        (found,) = [o for s, o in outputs(self.workspace, parse(data)) if s.kind == "verify"]
        proven = found.all_decisions().filter(pl.col("value") == 1.0)["id"]
        return rows.filter(pc.is_in(rows["id"], pa.array(proven.to_list(), pa.string())))

    # ---- what selecting costs ----------------------------------------------------------------

    def note_cost(self, arm: str, seconds: float) -> None:
        """Seconds until the rows were there, the first time; a second call finds them.

        Scores are in the store, so the first arm that needs a kind of them pays for all: its time
        is noted under the kind, and every arm that needs the kind is told it.
        """
        file = self.results / "costs.json"
        costs: dict[str, dict[str, float]] = {"kinds": {}, "arms": {}}
        if file.is_file():
            costs = json.loads(file.read_text(encoding="utf-8"))
        if arm in costs["arms"]:
            return
        new = [kind for kind in self.kinds(arm) if kind not in costs["kinds"]]
        for kind in new:
            costs["kinds"][kind] = round(seconds / len(new), 1)
        costs["arms"][arm] = 0.0 if new else round(seconds, 1)
        shards.write_json(file, costs)

    def kinds(self, arm: str) -> list[str]:
        """Kinds of model answers about the pool that an arm's rows need."""
        if arm.startswith("select "):
            needs = set(find(arm.removeprefix("select ")).needs)
        elif arm.startswith("chain"):
            gone = arm.removeprefix(WITHOUT) if arm.startswith(WITHOUT) else None
            stages = [s for s in self.recipe.stages if s.kind != gone]
            needs = {n for s in stages if s.kind == "select" for n in s.options.entry.needs}
            needs |= {s.kind for s in stages if s.kind == "confidence"}
        else:
            return []
        # A budget in loss tokens has every row scored, whatever the method.
        return ["likelihood", *(kind for kind in PASSES if kind in needs and kind != "likelihood")]

    def cost(self, arm: str, pool_tokens: int) -> tuple[float, int]:
        """Seconds, and tokens of forward passes over the pool, that an arm's rows cost."""
        file = self.results / "costs.json"
        costs = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if arm not in costs.get("arms", {}):
            return 0.0, 0
        kinds = self.kinds(arm)
        seconds = costs["arms"][arm] + sum(costs["kinds"].get(kind, 0.0) for kind in kinds)
        return seconds, round(sum(PASSES[kind] for kind in kinds) * pool_tokens)

    def pool_tokens(self) -> int:
        """Tokens of all pool rows, prompts included."""
        rows = Pool(self.workspace.pool(self.recipe.pool.name)).all_rows(COLUMNS)
        draw = self.world.draw
        return len(tokenize_rows(rows, draw.tokenizer, draw.max_length).tokens)

    # ---- the teacher -------------------------------------------------------------------------

    def teach(self) -> None:
        """Names the model that a chain asks for samples: trained on the proven rows."""
        if "teacher" not in self.recipe.models:
            return
        from siftline.training.finetune import finetune

        rows = self._proven()
        options = self.training()
        key = content_hash([sorted(rows["id"].to_pylist()), _said(options), VERSION])[:12]
        folder = self.root / "work" / f"teacher-{key}"
        started = time.perf_counter()
        finetune(
            Path(os.environ["SIFTLINE_SMOLLM2"]), rows, folder, options, seed=0,
            dataset_version="rows proven right",
            template=model_spec(self.workspace, self.recipe, "target").template,
        )  # fmt: skip
        os.environ["SIFTLINE_TEACHER"] = str(folder)
        self.note_cost("teacher", time.perf_counter() - started)

    # ---- training and asking -----------------------------------------------------------------

    def training(self, **changed: Any) -> Any:
        """How every arm but `full` is trained: the same loss tokens in the same steps."""
        training = self.recipe.training
        assert training is not None
        tokens = round(self.recipe.budget.size * training.epochs)
        return replace(training.options, loss_tokens=tokens, steps=self.steps, **changed)

    def cell(self, arm: str, seed: int, options: Any, split: str = "test") -> Cell:
        """A cell, its rows found; `full` sees every row as often as it is stated."""
        rows, asked = self.rows(arm, seed), options
        if arm == "full":
            training = self.recipe.training
            assert training is not None
            epochs = 1.0 if self.name == "choosing" else training.epochs
            options = replace(options, loss_tokens=None, steps=None, epochs=epochs)
        return Cell(arm, seed, rows, asked, options if rows is not None else None, split)

    def file_of(self, cell: Cell) -> Path:
        """Where a cell's answers are, named by what decides them."""
        decided = [
            VERSION,
            [] if cell.rows is None else sorted(cell.rows["id"].to_pylist()),
            None if cell.training is None else [_said(cell.training), cell.seed],
            directory_digest(Path(os.environ["SIFTLINE_SMOLLM2"])),
            self.questions(cell.split)["id"].to_list(),
            _said(self.recipe.evaluation),
            self.recipe.model("target").spec.template,
        ]
        return self.results / f"{content_hash(decided)[:16]}.json"

    def answered(self, cell: Cell) -> Answered | None:
        """What a cell left, or None where it has not run."""
        file = self.file_of(cell)
        if not file.is_file():
            return None
        self._list(cell, file)
        return read(file)

    def listed(self, arm: str, seed: int, options: Any) -> Answered | None:
        """What an arm and a seed left, without finding the arm's rows."""
        name = self._index().get(self._key(arm, seed, options, "test"))
        return None if name is None else read(self.results / name)

    def _index(self) -> dict[str, str]:
        file = self.results / "index.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def _key(self, arm: str, seed: int, options: Any, split: str) -> str:
        what = content_hash([self.recipe.hash, _said(options)])[:8]
        return f"{arm}, seed {seed}, {split}, {what}"

    def _list(self, cell: Cell, file: Path) -> None:
        index = self._index()
        key = self._key(cell.arm, cell.seed, cell.asked, cell.split)
        if index.get(key) != file.name:
            shards.write_json(self.results / "index.json", {**index, key: file.name})

    def run(self, cell: Cell) -> Answered:
        """Trains and asks, unless that was done before."""
        known = self.answered(cell)
        if known is not None:
            return known
        import torch

        from siftline.training.finetune import finetune

        torch.set_num_threads(self.threads)
        base, facts = Path(os.environ["SIFTLINE_SMOLLM2"]), {}
        folder = base
        started = time.perf_counter()
        if cell.rows is not None:
            folder = self.root / "work" / "cells" / self.file_of(cell).stem
            shutil.rmtree(folder, ignore_errors=True)  # of a killed one: minutes, not worth keeping
            result = finetune(
                base, cell.rows, folder, cell.training, seed=cell.seed, dataset_version=cell.arm,
                template=model_spec(self.workspace, self.recipe, "target").template,
            )  # fmt: skip
            facts = {
                "rows": cell.rows.num_rows, "seen": result.rows, "loss_tokens": result.loss_tokens,
                "steps": result.steps, "skipped": result.skipped.height,
                "good": self.good(cell.rows), "last_loss": result.curve["loss"].to_list()[-1],
            }  # fmt: skip
        trained = time.perf_counter()
        frame = self._ask(folder, cell.split)
        facts |= {
            "arm": cell.arm, "seed": cell.seed, "split": cell.split, "date": str(date.today()),
            "training_seconds": round(trained - started, 1),
            "asking_seconds": round(time.perf_counter() - trained, 1),
        }  # fmt: skip
        if cell.rows is not None:
            shutil.rmtree(folder)
        file = self.file_of(cell)
        shards.write_json(file, {**facts, "answers": frame.to_dicts()})
        self._list(cell, file)
        return Answered(frame, facts)

    def _ask(self, folder: Path, split: str) -> pl.DataFrame:
        from siftline.scoring.verifiers import get_verifier
        from siftline.stages.models import engines

        settings = self.recipe.evaluation
        assert settings is not None
        spec = replace(model_spec(self.workspace, self.recipe, "target"), path=str(folder))
        with engines() as opened:
            return evaluate(
                opened.get(spec), self.questions(split), get_verifier(settings.verifier), settings
            )

    # ---- the order of things -----------------------------------------------------------------

    def tuned(self, more: Callable[[], bool]) -> Any | None:
        """The options that did best on dev; None where time ran out before all were tried."""
        scores: dict[int, float] = {}
        for number, changed in enumerate(self.candidates):
            cells = [self.cell(a, 0, self.training(**changed), "dev") for a in TRIED]
            accuracies = []
            for cell in cells:
                if self.answered(cell) is None and not more():
                    return None
                got = self.run(cell)
                accuracies.append(float(got.frame["correct"].mean() or 0.0))
                self.say(f"dev: {changed} {cell.arm}: {100 * accuracies[-1]:.1f} %")
            scores[number] = sum(accuracies) / len(accuracies)
        best = max(scores, key=lambda number: (scores[number], -number))
        self.say(f"dev: best {self.candidates[best]}, mean accuracies {scores}")
        tried = [[changed, scores[i]] for i, changed in enumerate(self.candidates)]
        told = {"best": self.candidates[best], "dev": tried}
        shards.write_json(self.results / "tuned.json", told)
        return self.training(**self.candidates[best])


def _said(options: Any) -> dict[str, Any]:
    """The options that are not the defaults: one that is new and unused changes no name."""
    usual = asdict(type(options)())
    return {name: value for name, value in asdict(options).items() if value != usual[name]}


def run(asked: Any, commit: str) -> None:
    """Runs what is left of a world until the time is over, and prints what is in."""
    for name in ("SIFTLINE_SMOLLM2", "SIFTLINE_TEST_DATA"):
        if name not in os.environ:
            raise SystemExit(f"{name} is not set: see examples/smollm2/README.md")
    sys.path[:0] = [str(EXAMPLES / name) for name in ("smollm2", "natural_instructions")]
    minutes = 60 * asked.hours if asked.minutes is None else asked.minutes
    until = time.monotonic() + 60 * minutes

    def say(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)

    arena = Arena(asked.root.absolute(), asked.world, asked.threads, say, asked.small)
    arena.teach()
    for name in FIRST:
        arena.rows(name, 0)
    names, not_run = arms_of(arena.data, asked.method)
    wanted = [n for n in names if not asked.only or any(part in n for part in asked.only)]
    options = arena.tuned(lambda: time.monotonic() < until)
    if options is None:
        say("the time is over while options are tried on dev: the same command goes on")
        return
    _go_on(arena, wanted, asked.seeds, options, lambda: time.monotonic() < until)
    said = f"bench_value.py --world {asked.world} --seeds {asked.seeds}, {date.today()}, {commit}"
    print(said + (", SMALL: tries the machinery, measures nothing" if asked.small else ""))
    print(f"trained with {options.method}, {options.learning_rate}, {options.steps} steps\n")
    print("\n".join(table(arena, wanted, asked.seeds, options)))
    print()
    print("\n".join(caught(arena)))
    for name, why in not_run.items():
        print(f"not run: {name} {why}")


def _go_on(
    arena: Arena, names: list[str], seeds: int, options: Any, more: Callable[[], bool]
) -> None:
    """Runs the cells without answers, whole seeds first, until there is no more time."""
    for seed, name in product(range(seeds), names):
        if name == "zero-shot" and seed:  # it draws nothing
            continue
        if not more():
            arena.say("the time is over: the same command goes on")
            return
        cell = arena.cell(name, seed, options)
        if arena.answered(cell) is None:
            got = arena.run(cell)
            right = 100 * float(judged(got.frame)["correct"].mean() or 0.0)
            took = got.facts["training_seconds"] + got.facts["asking_seconds"]
            rows = got.facts.get("rows", 0)
            arena.say(f"{name} seed {seed}: {rows} rows, {took:.0f} s, {right:.1f} %")
