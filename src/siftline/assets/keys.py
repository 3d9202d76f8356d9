"""Names of assets, and of the groups the UI shows them in."""

from collections.abc import Iterable

import dagster as dg

from siftline.ingest.pool import PoolSpec
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Recipe
from siftline.stages.scorers import scorer_model

SHARED = "shared"
KINDS = {"parquet", "python"}
_SHARED_PARTS = ("inputs", "files", "pool", "models", "scores")


def recipes_of(assets: Iterable[dg.AssetKey]) -> list[str]:
    """Recipes whose own assets these are, shared ones aside; sorted."""
    return sorted({key.path[0] for key in assets if key.path[0] not in _SHARED_PARTS})


def inputs(recipe: Recipe) -> dg.AssetKey:
    """Raw files that a recipe's generator writes."""
    return dg.AssetKey(["inputs", recipe.name])


def files(spec: PoolSpec) -> dg.AssetKey:
    """What a pool or an evaluation set is read from, where it comes from outside."""
    return dg.AssetKey(["files", f"{spec.name}_files"])


def pool(spec: PoolSpec) -> dg.AssetKey:
    """A pool or an evaluation set."""
    return dg.AssetKey(["pool", spec.name])


def model(name: str) -> dg.AssetKey:
    """A model trained here from text."""
    return dg.AssetKey(["models", name])


def likelihood(recipe: Recipe) -> dg.AssetKey:
    """The score table of a recipe's pool under its target model."""
    return dg.AssetKey(["scores", recipe.pool.name, recipe.roles["target"], "likelihood"])


def scorer(recipe: Recipe, name: str) -> dg.AssetKey:
    """The table of a quality scorer on a recipe's pool."""
    return dg.AssetKey(["scores", recipe.pool.name, scorer_model(recipe, name), name])


def stage(recipe: Recipe, instance: Stage) -> dg.AssetKey:
    """A stage's decisions."""
    return dg.AssetKey([recipe.name, instance.name])


def outcome(recipe: Recipe, name: str) -> dg.AssetKey:
    """What comes after the stages: curated, model, evaluation, report."""
    return dg.AssetKey([recipe.name, name])
