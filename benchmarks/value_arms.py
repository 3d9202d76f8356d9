"""The rows of every arm of bench_value.py, drawn or selected from one pool at one budget."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from siftline.library import recipe_files
from siftline.recipe import parse
from siftline.scoring.templates import load_tokenizer
from siftline.selectors.chosen import Select
from siftline.selectors.registry import METHODS, Entry
from siftline.stages.arm_rows import COLUMNS, Draw, rows_of_arm
from siftline.stages.models import model_spec
from siftline.stages.publish import final_context, kept_rows
from siftline.stages.run import outputs, run_stage
from siftline.training.budget import tokenize_rows
from siftline.workspace import Workspace

RANDOMS = ("random", "random_clean", "random_sampled")
LEFT_OUT = (
    "duplicates", "decontamination", "verify", "likelihood", "diversity", "confidence",
    "rejection_sampling",
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    # An eighth of the default: minutes a seed on a CPU, at noise of 0.03 in a cosine.
    "less": {"gradients": {"dimensions": 1024}},
}
"""Of methods whose defaults are for larger machines."""
Say = Callable[[str], None]


def quiet(line: str) -> None: ...


def recipe_data(sizes: dict[str, int], budget: int) -> dict[str, Any]:
    """The demo's recipe with other sizes, as a mapping to change further."""
    data = yaml.safe_load(recipe_files()["demo"].read_text(encoding="utf-8"))
    data["inputs"]["args"] = sizes
    data["budget"]["size"] = budget
    # A tenth of the base model's own rate: at the demo's 1e-3 every arm unlearns.
    data["training"]["options"]["learning_rate"] = 3.0e-4
    return data


def without(data: dict[str, Any], kind: str) -> dict[str, Any]:
    """The recipe with one stage left out."""
    changed = copy.deepcopy(data)
    changed["stages"] = [s for s in changed["stages"] if _kind(s) != kind]
    return changed


def followed(data: dict[str, Any], kind: str, stage: dict[str, Any]) -> dict[str, Any]:
    """The recipe with one more stage right behind another."""
    changed = copy.deepcopy(data)
    at = [_kind(s) for s in changed["stages"]].index(kind)
    changed["stages"].insert(at + 1, stage)
    return changed


def with_options(data: dict[str, Any], kind: str, **options: Any) -> dict[str, Any]:
    """The recipe with other options of one stage."""
    changed = copy.deepcopy(data)
    changed["stages"] = [
        {kind: {**(s[kind] if isinstance(s, dict) else {}), **options}} if _kind(s) == kind else s
        for s in changed["stages"]
    ]
    return changed


def _kind(stage: Any) -> str:
    return stage if isinstance(stage, str) else next(iter(stage))


class World:
    """One pool, its base model, and the rows of arms."""

    def __init__(self, root: Path, data: dict[str, Any], say: Say) -> None:
        self.workspace, self.data, self.say = Workspace(root), data, say
        self.recipe = parse(data)
        spec = model_spec(self.workspace, self.recipe, "target")
        options = self.recipe.training.options
        self.draw = Draw(load_tokenizer(spec), options.max_length, data["budget"]["size"])

    def chain(self, data: dict[str, Any]) -> tuple[pa.Table, dict[str, int]]:
        """Rows that a chain keeps, and what it asked of the model: draws."""
        recipe = parse(data)
        for stage in recipe.stages:
            run_stage(self.workspace, recipe, stage.name, quiet)
        done = outputs(self.workspace, recipe)
        context = final_context(self.workspace, recipe, done)
        rows = pa.concat_tables(kept_rows(context, bucket) for bucket in context.buckets)
        draws = sum(int(out.facts.get("draws", 0)) for _, out in done)
        return rows.select(COLUMNS), {"draws": draws, "rows": rows.num_rows}

    def arm(self, name: str, seed: int) -> tuple[pa.Table, dict[str, int]]:
        """Rows of an arm by name, and its cost."""
        if name == "full" or name in RANDOMS:
            found = rows_of_arm(self.workspace, self.recipe, name, self.draw, seed, self.say)
            return found.rows, {"draws": 0, "rows": found.rows.num_rows}
        if name.startswith("select "):
            return self.chain(selecting(self.data, name.removeprefix("select "), seed))
        return self.chain(variants(self.data)[name])


def variants(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Chains by arm: the default one, each stage left out, and other choices inside stages.

    CLEAR's two, without sampling: "chain without rejection_sampling" is what the gates keep,
    "filtered and corrected" that with what Auto-Correct mends.
    """
    correct = {"correct": {"training": data["training"]["options"], "max_new_tokens": 96}}
    own = {"s3ft": {"max_new_tokens": 96}}
    filtered = without(data, "rejection_sampling")
    return {
        "chain": data,
        **{f"chain without {kind}": without(data, kind) for kind in LEFT_OUT},
        "chain, uniform targets": with_options(data, "rejection_sampling", target="uniform"),
        "filtered and corrected": followed(filtered, "confidence", correct),
        "filtered, self-answers": followed(filtered, "confidence", own),
        "chain, random fit": with_options(data, "allocate", fit="random"),
        "chain, answers by difficulty": with_options(data, "allocate", targets="prop2diff"),
    }


def selecting(data: dict[str, Any], method: str, seed: int) -> dict[str, Any]:
    """A method on the deduplicated and decontaminated pool, and nothing else."""
    chosen = {"method": method, "seed": seed, **OPTIONS.get(method, {})}
    stages = ["duplicates", "decontamination", {"select": chosen}]
    return {**data, "stages": stages}


def lacking(entry: Entry) -> list[str]:
    """Columns that a method reads by default and only a quality scorer could give."""
    return list(Select(entry.name).scorers())


def selectors() -> list[Entry]:
    """Every registered method; a new one joins by being registered."""
    return list(METHODS)


def loss_tokens(world: World, rows: pa.Table) -> int:
    """Loss tokens of a set of rows."""
    return int(tokenize_rows(rows, world.draw.tokenizer, world.draw.max_length).loss_tokens.sum())
