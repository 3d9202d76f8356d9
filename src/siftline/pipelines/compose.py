"""Recipes as Dagster sees them: their assets, jobs, schedules and sensors."""

from collections.abc import Sequence

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from siftline.assets import step as keys
from siftline.assets.outcome import outcome_assets, outcomes
from siftline.assets.shared import (
    inputs_asset,
    likelihood_asset,
    model_asset,
    pool_asset,
    scorer_asset,
)
from siftline.assets.stages import stage_asset
from siftline.assets.step import Siftline
from siftline.ingest.readers import source_files
from siftline.pipelines.executor import step_executor
from siftline.recipe.parse import Recipe, expand_pool, find
from siftline.rows.verified import content_hash
from siftline.workspace import Workspace

RETRIES = {
    "dagster/max_retries": "2",
    "dagster/retry_on_asset_or_op_failure": "false",  # a failed stage says why
}
"""A run whose process crashed is tried again, whatever instance it runs on."""


def recipe_job(recipe: Recipe) -> UnresolvedAssetJobDefinition:
    """Materializes everything a recipe says, upstream assets included."""
    last = [keys.outcome(recipe, name) for name in outcomes(recipe)]
    return dg.define_asset_job(
        recipe.name,
        selection=dg.AssetSelection.assets(*last).upstream(),
        tags=RETRIES,
        description=recipe.card.description or f"The whole chain of recipe {recipe.name}.",
    )


def recipe_schedule(recipe: Recipe, job: UnresolvedAssetJobDefinition) -> dg.ScheduleDefinition:
    """Reruns a recipe at its cron time; what did not change is found, not run."""
    return dg.ScheduleDefinition(
        name=f"{recipe.name}_schedule",
        job=job,
        cron_schedule=recipe.schedule,
        default_status=dg.DefaultScheduleStatus.STOPPED,
    )


def input_state(workspace: Workspace, recipe: Recipe) -> str | None:
    """Hash of names, sizes and times of a pool's input files; None while there are none."""
    import fsspec

    spec = expand_pool(recipe.pool, workspace.inputs(recipe.name))
    seen = []
    for source in spec.inputs:
        try:
            files = source_files(source)
        except ValueError:
            return None
        for file in files:
            system, path = fsspec.core.url_to_fs(file)
            info = system.info(path)
            seen.append([file, info.get("size"), str(info.get("mtime", info.get("LastModified")))])
    return content_hash(sorted(seen, key=str))


def new_files_sensor(recipe: Recipe, job: UnresolvedAssetJobDefinition) -> dg.SensorDefinition:
    """Asks for a run when the pool's input files change."""

    @dg.sensor(
        name=f"{recipe.name}_new_files",
        job=job,
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
    )
    def new_files(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        state = input_state(Workspace.from_environment(), recipe)
        if state is None:
            return dg.SkipReason("the recipe's input files are not there yet")
        if state == context.cursor:
            return dg.SkipReason("no input file changed")
        context.update_cursor(state)
        return dg.RunRequest(run_key=state)

    return new_files


def recipe_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """Every asset of one recipe, shared ones included."""
    assets = [inputs_asset(recipe)] if recipe.inputs else []
    assets.append(pool_asset(recipe, recipe.pool, "train"))
    assets += [pool_asset(recipe, spec, role) for role, spec in recipe.sets.items()]
    assets += [model_asset(recipe, name) for name, model in recipe.models.items() if model.pretrain]
    assets.append(likelihood_asset(recipe))
    assets += [scorer_asset(recipe, name) for name in recipe.scorers]
    assets += [stage_asset(recipe, stage) for stage in recipe.stages]
    return assets + outcome_assets(recipe)


def compose(recipes: Sequence[Recipe]) -> dg.Definitions:
    """Recipes as one set of definitions.

    Raises:
        ValueError: if two define one shared asset differently, or a name is taken.
    """
    for recipe in recipes:
        _check_names(recipe)
    assets: dict[dg.AssetKey, dg.AssetsDefinition] = {}
    owners: dict[dg.AssetKey, Recipe] = {}
    for recipe in recipes:
        for asset in recipe_assets(recipe):
            other = owners.setdefault(asset.key, recipe)
            if other is not recipe and shared_part(other) != shared_part(recipe):
                raise ValueError(
                    f"recipes {other.name!r} and {recipe.name!r} both define "
                    f"{asset.key.to_user_string()} and differ: rename the pool or model in one"
                )
            assets.setdefault(asset.key, asset)
    jobs = {recipe.name: recipe_job(recipe) for recipe in recipes}
    return dg.Definitions(
        assets=list(assets.values()),
        jobs=list(jobs.values()),
        schedules=[recipe_schedule(recipe, jobs[recipe.name]) for recipe in recipes],
        sensors=[new_files_sensor(recipe, jobs[recipe.name]) for recipe in recipes],
        resources={"siftline": Siftline()},
        executor=step_executor,
    )


def _check_names(recipe: Recipe) -> None:
    """Refuses a stage whose asset would take the place of another of the recipe's."""
    for stage in recipe.stages:
        if stage.name in outcomes(recipe):
            raise ValueError(
                f"recipe {recipe.name!r}: a stage can't be called {stage.name!r}, that is what "
                "comes after the stages: rename it"
            )


def shared_part(recipe: Recipe) -> tuple[object, ...]:
    """What two recipes must agree on to share pools, models and scores."""
    return (
        recipe.pool,
        recipe.sets,
        recipe.models,
        recipe.inputs,
        recipe.likelihood,
        recipe.scorers,
    )


def job_of(recipe: str) -> dg.JobDefinition:
    """The job of one recipe; what the processes of `siftline run` rebuild it from."""
    return compose([find(recipe)]).resolve_job_def(recipe)
