"""Recipes as Dagster sees them: their assets, jobs, schedules and sensors.

Jobs, schedules and sensors: one of each per recipe; the last two are off until switched on.
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from dagster._utils.schedules import is_valid_cron_schedule
from dagster_shared.check import CheckError

from siftline.assets import step as keys
from siftline.assets.metadata import check_result
from siftline.assets.outcome import outcome_assets, outcomes
from siftline.assets.shared import (
    files_asset,
    inputs_asset,
    likelihood_asset,
    model_asset,
    observe_files,
    pool_asset,
    scorer_asset,
)
from siftline.assets.stages import stage_asset
from siftline.assets.step import owned, siftline_resource
from siftline.config import nearest
from siftline.ingest.files import file_states
from siftline.pipelines.executor import step_executor
from siftline.recipe.parse import Recipe, expand_pool, find
from siftline.rows.verified import content_hash
from siftline.workspace import Workspace

RETRIES = {
    "dagster/max_retries": "2",
    "dagster/retry_on_asset_or_op_failure": "false",  # a failed stage says why
}
"""A run whose process crashed is tried again, whatever instance it runs on."""
FILES_TAG = "siftline/files"
"""Tag of runs that the sensor asked for: which request."""
GONE = "0" * 64
"""State of files of which a whole source has gone."""
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 60.0, 3600.0
"""Between runs of one state that fail: doubled each time, from the second on."""
UNRECORDED_SECONDS = 600.0
"""After which a run that was asked for and has no record is asked for again."""
_WAITING = (dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.QUEUED)


def recipe_job(recipe: Recipe) -> UnresolvedAssetJobDefinition:
    """Materializes everything a recipe says, upstream assets included."""
    last = [keys.outcome(recipe, name) for name in outcomes(recipe)]
    return dg.define_asset_job(
        recipe.name,
        selection=dg.AssetSelection.assets(*last).upstream(),
        tags=RETRIES | owned(recipe),
        description=recipe.card.description or f"The whole chain of recipe {recipe.name}.",
    )


def recipe_schedule(recipe: Recipe, job: UnresolvedAssetJobDefinition) -> dg.ScheduleDefinition:
    """Reruns a recipe at its cron time; what did not change is found, not run."""
    return timed(recipe.name, job, recipe.schedule)


def timed(name: str, job: UnresolvedAssetJobDefinition, said: str) -> dg.ScheduleDefinition:
    """A schedule, off until switched on.

    Args:
        name: The recipe's.
        job: Its job.
        said: `minute hour day month weekday` in UTC, or in the zone of a `CRON_TZ=Area/City` before
            it, as cron itself has it.

    Raises:
        ValueError: if it is not that, or there is no such zone.
    """
    zone, cron = "UTC", said.strip()
    if found := re.fullmatch(r"(?:CRON_)?TZ=(\S+)\s+(.*)", cron):
        zone, cron = found[1], found[2]
    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError):
        raise ValueError(
            f"schedule: no time zone {zone!r}: {nearest(zone, sorted(available_timezones()))}"
        ) from None
    if not is_valid_cron_schedule(cron):
        raise ValueError(
            f"schedule: {said!r} is no cron time: write minute hour day month weekday, such as "
            "'0 3 * * *' or 'CRON_TZ=Europe/Berlin 0 3 * * *'"
        )
    return dg.ScheduleDefinition(
        name=f"{name}_schedule",
        job=job,
        cron_schedule=cron,
        execution_timezone=zone,
        default_status=dg.DefaultScheduleStatus.STOPPED,
    )


def input_state(workspace: Workspace, recipe: Recipe) -> str | None:
    """Hash of paths, sizes and times of what the pool and the sets are read from.

    Returns:
        None while a source matches no file.
    """
    seen = []
    for spec in (recipe.pool, *(spec for _, spec in recipe.sets.items())):
        try:
            states = file_states(expand_pool(spec, workspace.inputs(recipe.name)).inputs)
        except ValueError:
            return None
        seen.append([spec.name, *states])
    return content_hash(seen)


@dataclass(frozen=True)
class Asked:
    """What the sensor asked for last; kept as its cursor.

    Attributes:
        state: State of the files, see `input_state`.
        key: Key and tag of the run; no other run has it.
        at: When, in seconds since 1970.
        failed: How many runs of this state have failed one after the other.
        done: Whether a run of this state succeeded.
    """

    state: str
    key: str
    at: float
    failed: int = 0
    done: bool = False

    @classmethod
    def read(cls, cursor: str | None) -> "Asked | None":
        """The cursor's; None where there is none, or one of an earlier version of Siftline."""
        if not cursor or not cursor.startswith("{"):
            return None
        return cls(**json.loads(cursor))

    @classmethod
    def anew(cls, state: str, now: float, failed: int = 0) -> "Asked":
        """A run of its own: the time is in its key, for a state may come back."""
        return cls(state, f"{state[:12]}-{now:.3f}", now, failed)

    def cursor(self) -> str:
        """As the sensor keeps it."""
        return json.dumps(asdict(self))


def next_run(
    state: str | None, last: Asked | None, run: dg.DagsterRun | None, now: float
) -> tuple[Asked | None, str | None]:
    """Whether a run is to be asked for.

    A state counts as done when its run succeeded, not when it was asked for: what failed is tried
    again, at the next look and then after pauses that double.

    Args:
        state: State of the files now; None while a source matches none.
        last: What was asked for last.
        run: Newest run of what was asked for; None where there is no record of one.
        now: Seconds since 1970.

    Returns:
        What to remember, and why no run is asked for, or None: one is.
    """
    if state is None:
        return last, "the recipe's input files are not there yet"
    if last is None:
        return Asked.anew(state, now), None
    if state != last.state:
        if run is not None and run.status in _WAITING:
            reason = f"run {run.run_id[:8]} has not begun: it will read the files as they are now"
            return replace(last, state=state, failed=0), reason
        return Asked.anew(state, now), None
    if last.done or (run is not None and run.is_success):
        return replace(last, done=True), "no input file changed"
    if run is None:
        if now - last.at < UNRECORDED_SECONDS:
            return last, "no input file changed since a run was asked for"
        return Asked.anew(state, now, last.failed), None
    if not run.is_finished:
        return last, f"no input file changed; run {run.run_id[:8]} is under way"
    return _again(last, run, now)


def _again(last: Asked, run: dg.DagsterRun, now: float) -> tuple[Asked, str | None]:
    """The same state once more, after a pause; who cancelled a run meant to have some peace."""
    cancelled = run.status == dg.DagsterRunStatus.CANCELED
    pause = min(PAUSE_SECONDS * 2**last.failed, LONGEST_PAUSE_SECONDS) if last.failed else 0.0
    pause = LONGEST_PAUSE_SECONDS if cancelled else pause
    left = last.at + pause - now
    if left > 0:
        ended = "was cancelled" if cancelled else "failed"
        return last, f"run {run.run_id[:8]} of these files {ended}: again in {left / 60:.0f} min"
    return Asked.anew(last.state, now, last.failed + 1), None


def new_files_sensor(recipe: Recipe, job: UnresolvedAssetJobDefinition) -> dg.SensorDefinition:
    """Asks for a run when a file that the recipe reads comes, changes or goes."""

    def new_files(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        last = Asked.read(context.cursor)
        workspace = Workspace.from_environment()
        state = input_state(workspace, recipe)
        if state is None and last is not None and recipe.inputs is None:
            state = GONE  # what was there is not: a run says so
        # Looked up after the files: a run that has not begun will see what was seen here.
        run = _newest_run(context, last.key) if last is not None else None
        asked, reason = next_run(state, last, run, time.time())
        if asked is not None and asked != last:
            context.update_cursor(asked.cursor())
        if reason is not None:
            return dg.SkipReason(reason)
        assert asked is not None
        if _has_instance(context):
            for spec in (recipe.pool, *(spec for _, spec in recipe.sets.items())):
                observe_files(context.instance, workspace, recipe, spec.name)
        return dg.RunRequest(run_key=asked.key, tags={FILES_TAG: asked.key})

    text = "A run when an input file comes, changes or goes, again until one succeeds."
    return sensor_of(recipe.name, job, new_files, text)


def sensor_of(
    name: str,
    job: UnresolvedAssetJobDefinition,
    look: Callable[[dg.SensorEvaluationContext], dg.RunRequest | dg.SkipReason],
    description: str,
) -> dg.SensorDefinition:
    """A recipe's sensor, off until switched on; it looks once a minute."""
    return dg.SensorDefinition(
        name=f"{name}_new_files",
        job=job,
        evaluation_fn=look,
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description=description,
    )


def _has_instance(context: dg.SensorEvaluationContext) -> bool:
    """Whether this is a look of a daemon; one by hand may have no instance."""
    return context.instance_ref is not None or context._instance is not None


def _newest_run(context: dg.SensorEvaluationContext, key: str) -> dg.DagsterRun | None:
    """The newest run of a request; Dagster's own retries carry its tag."""
    if not _has_instance(context):
        return None
    runs = context.instance.get_runs(dg.RunsFilter(tags={FILES_TAG: key}), limit=1)
    return runs[0] if runs else None


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


def recipe_assets(recipe: Recipe) -> list[dg.AssetsDefinition | dg.SourceAsset]:
    """Every asset of one recipe, shared ones included."""
    assets: list[dg.AssetsDefinition | dg.SourceAsset] = []
    assets += [inputs_asset(recipe)] if recipe.inputs else []
    assets.append(pool_asset(recipe, recipe.pool, "train"))
    assets += [pool_asset(recipe, spec, role) for role, spec in recipe.sets.items()]
    specs = (recipe.pool, *(spec for _, spec in recipe.sets.items()))
    assets += [found for spec in specs if (found := files_asset(recipe, spec)) is not None]
    assets += [model_asset(recipe, name) for name, model in recipe.models.items() if model.pretrain]
    assets.append(likelihood_asset(recipe))
    assets += [scorer_asset(recipe, name) for name in recipe.scorers]
    assets += [stage_asset(recipe, stage) for stage in recipe.stages]
    return [*assets, *outcome_assets(recipe)]


def compose(
    recipes: Sequence[Recipe], broken: Mapping[str, str] = MappingProxyType({})
) -> dg.Definitions:
    """Recipes as one set of definitions.

    Args:
        recipes: Valid recipes.
        broken: What is wrong with each of the others.

    Raises:
        ValueError: if two define one shared asset differently, or a name is taken.
    """
    for recipe in recipes:
        _check_names(recipe)
    assets: dict[dg.AssetKey, dg.AssetsDefinition | dg.SourceAsset] = {}
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
    marks: list[Broken] = []
    for name, error in broken.items():
        label = re.sub(r"\W", "_", name)
        while label in {*jobs, *(mark.job.name for mark in marks)}:
            label += "_"
        marks.append(broken_recipe(name, label, error))
    return dg.Definitions(
        assets=[*assets.values(), *(mark.asset for mark in marks)],
        jobs=[*jobs.values(), *(mark.job for mark in marks)],
        schedules=[recipe_schedule(recipe, jobs[recipe.name]) for recipe in recipes]
        + [mark.schedule for mark in marks],
        sensors=[new_files_sensor(recipe, jobs[recipe.name]) for recipe in recipes]
        + [mark.sensor for mark in marks],
        resources={"siftline": siftline_resource},
        executor=step_executor,
    )


_UNFIT = (ValueError, dg.DagsterError, CheckError)


def compose_all(recipes: Sequence[Recipe], broken: Mapping[str, str]) -> dg.Definitions:
    """All recipes: one that can't be composed, alone or beside the others, takes none other down.

    Args:
        recipes: Valid recipes; of two that don't go together the first by name stays.
        broken: What is wrong with each of the others.
    """
    try:
        return compose(recipes, broken)
    except _UNFIT:
        pass  # found below, one by one
    good: list[Recipe] = []
    wrong = dict(broken)
    for recipe in recipes:
        try:
            compose([*_sharing(recipe, good), recipe])
        except _UNFIT as error:
            wrong[recipe.name] = f"{recipe.name}.yaml: {' '.join(str(error).split())}"
        else:
            good.append(recipe)
    return compose(good, dict(sorted(wrong.items())))


def _sharing(recipe: Recipe, others: Sequence[Recipe]) -> list[Recipe]:
    """Those of the others with which a recipe has a pool, a set or a model in common."""
    return [other for other in others if recipe.shared_names & other.shared_names]


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
