"""Jobs, schedules and sensors: one of each per recipe; the last two are off until switched on."""

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from siftline.assets import keys
from siftline.assets.outcome import outcomes
from siftline.ingest.readers import source_files
from siftline.recipe.parse import Recipe, expand_pool
from siftline.shards import content_hash
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
