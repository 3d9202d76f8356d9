"""What every asset needs: its names, its resources, whether its step asks a model."""

from collections.abc import Callable, Mapping
from pathlib import Path

import dagster as dg

from siftline.ingest.pool import Pool, PoolSpec
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Recipe, find
from siftline.stages.arms import arms_pending
from siftline.stages.evaluation import evaluation_pending
from siftline.stages.models import model_spec, trained_folder
from siftline.stages.run import stage_asks
from siftline.stages.scorers import scorer_model, scorer_table
from siftline.stages.scores import likelihood_table
from siftline.workspace import Workspace

SHARED = "shared"
KINDS = {"parquet", "python"}


def inputs(recipe: Recipe) -> dg.AssetKey:
    """Raw files that a recipe's generator writes."""
    return dg.AssetKey(["inputs", recipe.name])


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


class Siftline(dg.ConfigurableResource):
    """The root folder and the recipe changes of a run.

    Attributes:
        root: Root folder; empty takes SIFTLINE_ROOT, else ./siftline-data.
        overrides: `key=value` changes to the recipe, as `siftline run --set` takes them.
    """

    root: str = ""
    overrides: list[str] = []  # noqa: RUF012  pydantic copies defaults

    @property
    def workspace(self) -> Workspace:
        """Paths below the root."""
        return Workspace(Path(self.root).absolute()) if self.root else Workspace.from_environment()

    def recipe(self, name: str) -> Recipe:
        """A recipe with this run's changes."""
        return find(name, self.overrides)


RECIPE, PART, OF = "siftline/recipe", "siftline/part", "siftline/of"


def tags(recipe: Recipe, part: str, of: str) -> dict[str, str]:
    """Tags of an asset that may ask a model.

    Args:
        recipe: Its recipe.
        part: A key of `_ASKS`.
        of: Name of the stage, scorer or model.
    """
    assert part in _ASKS, part
    return {RECIPE: recipe.name, PART: part, OF: of}


def asks_a_model(siftline: Siftline, step: Mapping[str, str]) -> bool:
    """Whether a step with these tags is going to ask a model.

    A step that can't tell, because what it needs is missing or broken, asks none: it says what is
    wrong when it runs.
    """
    if PART not in step:
        return False
    try:
        return _ASKS[step[PART]](siftline.workspace, siftline.recipe(step[RECIPE]), step[OF])
    except (ValueError, OSError):
        return False


def _likelihood(workspace: Workspace, recipe: Recipe, of: str) -> bool:
    pool = Pool(workspace.pool(recipe.pool.name))
    folder = workspace.scores(recipe.pool.name, recipe.roles["target"], "likelihood")
    spec = model_spec(workspace, recipe, "target")
    return likelihood_table(folder, pool, spec, recipe.likelihood).finished() is None


def _scorer(workspace: Workspace, recipe: Recipe, of: str) -> bool:
    return scorer_table(workspace, recipe, of).finished() is None


def _base(workspace: Workspace, recipe: Recipe, of: str) -> bool:
    return not (trained_folder(workspace, recipe, of) / "config.json").exists()


def _arms(workspace: Workspace, recipe: Recipe, of: str) -> bool:
    return arms_pending(workspace, recipe)


def _evaluation(workspace: Workspace, recipe: Recipe, of: str) -> bool:
    return evaluation_pending(workspace, recipe)


_ASKS: dict[str, Callable[[Workspace, Recipe, str], bool]] = {
    "likelihood": _likelihood,
    "scorer": _scorer,
    "base": _base,
    "stage": stage_asks,
    "arms": _arms,
    "evaluation": _evaluation,
}
