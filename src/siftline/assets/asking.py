"""Whether an asset's step is going to ask a model, by what is there now.

The executor asks this when a step's turn comes: a step that will load a model gets a process and a
slot of its own, a step that finds its output gets neither.
"""

from collections.abc import Callable, Mapping

from siftline.assets.resource import Siftline
from siftline.ingest.pool import Pool
from siftline.recipe.parse import Recipe
from siftline.stages.arms import arms_pending
from siftline.stages.evaluation import evaluation_pending
from siftline.stages.models import model_spec, trained_folder
from siftline.stages.run import stage_asks
from siftline.stages.scorers import scorer_table
from siftline.stages.scores import likelihood_table
from siftline.workspace import Workspace

RECIPE, PART, OF = "siftline/recipe", "siftline/part", "siftline/of"
OWNER = "siftline/owner"
"""Tag of steps that decide for one recipe, and of runs: one run of a recipe at a time."""


def tags(recipe: Recipe, part: str, of: str) -> dict[str, str]:
    """Tags of an asset that may ask a model.

    Args:
        recipe: Its recipe.
        part: A key of `_ASKS`.
        of: Name of the stage, scorer or model.
    """
    assert part in _ASKS, part
    return {RECIPE: recipe.name, PART: part, OF: of}


FILES = "siftline/files_of"
"""Tag of steps that read files from outside: name of the pool or set."""


def reading(recipe: Recipe, pool: str) -> dict[str, str]:
    """Tags of an asset that reads files from outside."""
    return {RECIPE: recipe.name, FILES: pool}


def owned(recipe: Recipe) -> dict[str, str]:
    """Tags of an asset that is one recipe's own."""
    return {OWNER: recipe.name}


def asks_a_model(siftline: Siftline, step: Mapping[str, str]) -> bool:
    """Whether a step with these tags is going to ask a model.

    A step that can't tell, because what it needs is missing or broken, asks none: it says what is
    wrong when it runs.
    """
    if PART not in step:
        return False
    try:
        name, of = step[RECIPE], step[OF]
        if step[PART] in _SHARED:
            recipe = siftline.shared(name, of if step[PART] == "base" else None)
        else:
            recipe = siftline.recipe(name)
        return _ASKS[step[PART]](siftline.workspace, recipe, of)
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
_SHARED = ("likelihood", "scorer", "base")
"""Those that recipes have in common."""
