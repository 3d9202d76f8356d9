"""A recipe that can't be used, as Dagster shows it: a group of its own that says what is wrong."""

from dataclasses import dataclass

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from siftline.assets.metadata import check_result
from siftline.pipelines.jobs import sensor_of, timed
from siftline.recipe.library import find


@dataclass(frozen=True)
class Broken:
    """What stands in the place of a recipe.

    Its schedule and its sensor keep their names, so that those who switched them on see red runs
    and ticks, not silence.
    """

    asset: dg.AssetsDefinition
    job: UnresolvedAssetJobDefinition
    schedule: dg.ScheduleDefinition
    sensor: dg.SensorDefinition


def broken_recipe(name: str, label: str, error: str) -> Broken:
    """The mark of a recipe that can't be used.

    Args:
        name: The file's stem.
        label: Name of its group and its job.
        error: What is wrong with it, in one line.
    """
    key = dg.AssetKey([name, "recipe"])

    @dg.asset(
        key=key,
        group_name=label,
        kinds={"yaml"},
        description=f"This recipe is not loaded. {error}",
        check_specs=[
            dg.AssetCheckSpec("is_valid", asset=key, blocking=True, description=error),
        ],
    )
    def recipe(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        found = error
        try:
            find(name)
        except (ValueError, OSError) as now:
            found = str(now)
        remedy = "mend it, and reload the code location"
        verdict = check_result(key, "is_valid", False, found, remedy, {})
        return dg.MaterializeResult(check_results=[verdict])

    job = dg.define_asset_job(label, selection=dg.AssetSelection.assets(key), description=error)

    def look(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        raise ValueError(error)

    return Broken(recipe, job, timed(label, job, "0 3 * * *"), sensor_of(label, job, look, error))
