"""What a recipe's rejection sampling would cost, before it is run."""

from collections.abc import Callable
from dataclasses import replace

from siftline.ingest.pool import Pool
from siftline.recipe.parse import Recipe
from siftline.stages.context import Context
from siftline.stages.models import engines
from siftline.stages.rejection_sampling.preview import Preview
from siftline.stages.rejection_sampling.run import preview_of
from siftline.stages.run import outputs
from siftline.workspace import Workspace


def plan_stage(
    workspace: Workspace, recipe: Recipe, name: str, emit: Callable[[str], None]
) -> Preview:
    """Draws the pilot of a rejection sampling stage and predicts the rest.

    The pilot's draws are kept in the store, so running the stage afterwards begins behind them.

    Args:
        workspace: The root.
        recipe: The recipe.
        name: The stage's name.
        emit: Takes lines of progress.

    Raises:
        ValueError: if a stage before it has not been run with these settings.
    """
    stage = recipe.stage(name)
    assert stage.kind == "rejection_sampling", stage.kind
    before = outputs(workspace, recipe, until=name)
    pool = Pool(workspace.pool(recipe.pool.name))
    with engines() as opened:
        found = preview_of(Context(workspace, recipe, stage, pool, before, opened, emit))
    return replace(found, room=_room(recipe, found))


def _room(recipe: Recipe, found: Preview) -> int | None:
    """Answers that the budget can keep: rows, or loss tokens at the draws' mean length."""
    if recipe.stages[-1].of.role != "budget":
        return None
    if recipe.budget.unit == "rows":
        return recipe.budget.size
    if not found.draws.mean:
        return None  # nothing left to draw, and no length to go by
    return int(recipe.budget.size * found.draws.mean / found.tokens.mean)


def sampling_stages(recipe: Recipe) -> list[str]:
    """Names of the recipe's rejection sampling stages, in order."""
    return [stage.name for stage in recipe.stages if stage.kind == "rejection_sampling"]
