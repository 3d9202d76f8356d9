"""Which rows each training arm takes.

The curated rows prove nothing alone. Random rows of the readable pool show what selecting is worth,
random rows of the deduplicated and decontaminated pool what it is worth beyond hygiene, and those
with vanilla rejection sampling what it is worth beyond the model calls it made. Every random arm
holds as many loss tokens as the curated version, drawn by hash; the full pool is not cut, and is
seen as far as the same budget goes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from siftline import schema
from siftline.ingest.pool import Pool
from siftline.kernels.draws import hash64
from siftline.ledger import REMOVED
from siftline.recipe.parse import Recipe
from siftline.stages.context import by_store_bucket
from siftline.stages.models import engines, model_spec
from siftline.stages.run import outputs
from siftline.training.budget import rows_for_budget, tokenize_rows
from siftline.workspace import Workspace

COLUMNS = ["id", "messages", "tools", "source"]
HYGIENE = ("duplicates", "decontamination")


@dataclass(frozen=True)
class ArmRows:
    """Rows of an arm, with the columns of `COLUMNS`, and what they are, for model cards."""

    rows: pa.Table
    name: str


@dataclass(frozen=True)
class Draw:
    """What random arms are drawn with.

    Attributes:
        tokenizer: Of the target model.
        max_length: Longest row in tokens.
        budget: Loss tokens of the curated version.
    """

    tokenizer: Any
    max_length: int
    budget: int


def rows_of_arm(
    workspace: Workspace,
    recipe: Recipe,
    arm: str,
    draw: Draw,
    seed: int,
    emit: Callable[[str], None] = lambda line: None,
) -> ArmRows:
    """Rows of an arm that is held against the curated one.

    Args:
        workspace: The root.
        recipe: The recipe, its stages run.
        arm: One of `sections.ARMS` but "curated".
        draw: Budget and lengths.
        seed: Of the training run; another seed draws other rows.
        emit: Takes lines of progress.
    """
    return drawn(offer(workspace, recipe, arm, emit), arm, draw, seed)


def offer(workspace: Workspace, recipe: Recipe, arm: str, emit: Callable[[str], None]) -> ArmRows:
    """The rows that an arm may take, whatever the seed; see `rows_of_arm`."""
    pool = Pool(workspace.pool(recipe.pool.name))
    rows = pool.all_rows(COLUMNS)
    said = f"pool {recipe.pool.name} {pool.version[:12]}"
    if arm in ("random_clean", "random_sampled"):
        rows = _without(rows, _unclean(workspace, recipe))
        said = f"{said}, deduplicated and decontaminated"
    if arm == "random_sampled":
        rows = pa.concat_tables([rows, _sampled(workspace, recipe, pool, emit)])
        said = f"{said}, with vanilla rejection sampling"
    return ArmRows(rows, said)


def drawn(offered: ArmRows, arm: str, draw: Draw, seed: int) -> ArmRows:
    """What the arm takes of its offer with this seed: all of the full pool, else a random part."""
    if arm == "full":
        return offered
    return ArmRows(_cut(offered.rows, draw, seed), f"random rows of {offered.name}")


def _cut(rows: pa.Table, draw: Draw, seed: int) -> pa.Table:
    """Rows drawn by hash until they hold the budget."""
    sized = tokenize_rows(rows, draw.tokenizer, draw.max_length)
    drawn = hash64(seed, "random arm")
    chosen = rows_for_budget(sized.ids, sized.loss_tokens, draw.budget, drawn)
    wanted = pa.array(sorted(set(chosen)), pa.string())
    return rows.filter(pa.compute.is_in(rows["id"], wanted))


def _without(rows: pa.Table, gone: set[str]) -> pa.Table:
    lost = pa.compute.is_in(rows["id"], pa.array(sorted(gone), pa.string()))
    return rows.filter(pa.compute.invert(lost))


def _unclean(workspace: Workspace, recipe: Recipe) -> set[str]:
    """Ids that the recipe's duplicates and decontamination gates removed."""
    done = [out for stage, out in outputs(workspace, recipe) if stage.kind in HYGIENE]
    if not done:
        raise ValueError(
            f"recipe {recipe.name!r} has no duplicates or decontamination stage, which arms "
            "random_clean and random_sampled stand on: add one, or leave these arms out"
        )
    gone: set[str] = set()
    for output in done:
        gone |= set(output.all_decisions().filter(outcome=REMOVED)["id"].to_list())
    return gone


def _sampled(
    workspace: Workspace, recipe: Recipe, pool: Pool, emit: Callable[[str], None]
) -> pa.Table:
    """Verified draws for the clean rows' prompts, as many draws as the recipe's own stage made."""
    stages = [s for s in outputs(workspace, recipe) if s[0].kind == "rejection_sampling"]
    if not stages:
        raise ValueError(
            f"recipe {recipe.name!r} has no rejection_sampling stage, whose cost arm "
            "random_sampled copies: add one, or leave the arm out"
        )
    draws = sum(int(output.facts["draws"]) for _, output in stages)
    gone = _unclean(workspace, recipe)
    buckets = by_store_bucket(lambda b: _without(pool.rows(b), gone), pool.buckets)
    with engines() as opened:
        sampler = opened.recorder(
            model_spec(workspace, recipe, "sampler"), workspace.store, lambda rows, tokens: None
        )
        from siftline.stages.rejection_sampling.run import vanilla_rows

        added = vanilla_rows(sampler, buckets, stages[0][0].options, draws)
    emit(f"random_sampled: {draws:,} vanilla draws, {len(added):,} distinct verified rows")
    return pa.Table.from_pylist(added, schema=schema.ADDED).select(COLUMNS)
