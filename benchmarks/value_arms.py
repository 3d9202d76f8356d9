"""The rows of every arm of bench_value.py, drawn or selected from one pool at one budget."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import yaml

from siftline.ingest.pool import Pool
from siftline.recipe.parse import parse, recipe_files
from siftline.rows.ledger import REMOVED
from siftline.scoring.templates import load_tokenizer
from siftline.selectors.registry import Entry, find, methods
from siftline.stages.arms import COLUMNS, Draw, rows_of_arm
from siftline.stages.models import model_spec
from siftline.stages.publish import final_context, kept_rows
from siftline.stages.run import outputs, run_stage
from siftline.stages.select.options import Select
from siftline.training.schedule import tokenize_rows
from siftline.workspace import Workspace

RANDOMS = ("random", "random_clean", "random_sampled")
LEFT_OUT = (
    "duplicates", "decontamination", "verify", "likelihood", "diversity", "confidence",
    "rejection_sampling",
)  # fmt: skip
SAMPLING = "rejection_sampling"
GATES = ("duplicates", "decontamination", "verify")
VANILLA, STRONGEST = "chain, vanilla targets", "chain, strongest source"
OPTIONS: dict[str, dict[str, Any]] = {
    # An eighth of the default: minutes a seed on a CPU, at noise of 0.03 in a cosine.
    "less": {"gradients": {"dimensions": 1024}},
}
"""Of methods whose defaults are for larger machines."""
Say = Callable[[str], None]


def quiet(line: str) -> None: ...


def recipe_data(
    sizes: dict[str, int], budget: int, base: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The demo's recipe with other sizes, as a mapping to change further.

    Args:
        sizes: Of the world.
        budget: Loss tokens.
        base: Other sizes of the base model.
    """
    data = yaml.safe_load(recipe_files()["demo"].read_text(encoding="utf-8"))
    data["inputs"]["args"] = sizes
    data["budget"]["size"] = budget
    data["models"]["base"]["pretrain"] |= base or {}
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
        if name == VANILLA:
            return self.chain(vanilla(self.data, self.draws_per_prompt()))
        if name == STRONGEST:
            return self.chain(of_source(self.data, self.strongest()))
        return self.chain(variants(self.data)[name])

    def draws_per_prompt(self) -> int:
        """Draws of the default chain for a prompt, rounded; its stages have run."""
        facts = [o.facts for s, o in outputs(self.workspace, self.recipe) if s.kind == SAMPLING]
        draws, prompts = (sum(int(f[name]) for f in facts) for name in ("draws", "prompts"))
        return max(1, round(draws / prompts))

    def strongest(self) -> str:
        """The source whose answers the default chain's verify stage found right most often.

        Counted over the rows with an independent answer that reached it, those without a final
        answer as wrong ones; of equal sources the first by name.
        """
        (found,) = [o for s, o in outputs(self.workspace, self.recipe) if s.kind == "verify"]
        pool = Pool(self.workspace.pool(self.recipe.pool.name))
        sources = pl.from_arrow(pool.all_rows(["id", "source"]))
        assert isinstance(sources, pl.DataFrame)
        removed = pl.col("outcome") == REMOVED
        judged = found.all_decisions().filter(removed | pl.col("value").is_not_null())
        rates = judged.join(sources, on="id").group_by("source").agg((~removed).mean())
        return str(rates.sort(["outcome", "source"], descending=[True, False])["source"][0])


def vanilla(data: dict[str, Any], draws: int) -> dict[str, Any]:
    """The chain with so many draws of every prompt, all that is right kept."""
    return with_options(data, SAMPLING, target="vanilla", k=draws)


def of_source(data: dict[str, Any], source: str) -> dict[str, Any]:
    """Deduplicated, decontaminated and verified rows of one source, a random part of them."""
    only = {"answers": 1, "fit": "random", "mixture": {source: 1.0}}
    return {**data, "stages": [*GATES, {"allocate": only}]}


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
        "chain, answers alike": with_options(data, "allocate", targets="uniform"),
    }


def chains(data: dict[str, Any]) -> list[str]:
    """Arms whose rows one recipe decides, the same for every seed.

    Beside `variants` two that are measured on the default chain first: `VANILLA` spends about its
    draws (as many for every prompt, rounded) without aiming, and `STRONGEST` trades the answers
    that fit best for those of the source that verify finds right most often: its deduplicated,
    decontaminated and verified rows, drawn at random up to the budget. No shortlist, no samples and
    no confidence gate: one source alone would not fill the budget behind them.
    """
    return [*variants(data), VANILLA, STRONGEST]


def selecting(data: dict[str, Any], method: str, seed: int) -> dict[str, Any]:
    """A method on the deduplicated and decontaminated pool, and nothing else."""
    chosen = {"method": method, "seed": seed, **OPTIONS.get(method, {})}
    stages = ["duplicates", "decontamination", {"select": chosen}]
    return {**data, "stages": stages}


def lacking(entry: Entry) -> list[str]:
    """Columns that a method reads by default and only a quality scorer could give."""
    return list(Select(entry.name).scorers())


def selectors(own: Sequence[str] = ()) -> list[Entry]:
    """Methods of siftline, those that installed packages register, and others by import path."""
    return [*methods(), *map(find, own)]


def loss_tokens(world: World, rows: pa.Table) -> int:
    """Loss tokens of a set of rows."""
    return int(tokenize_rows(rows, world.draw.tokenizer, world.draw.max_length).loss_tokens.sum())
