"""Runs a recipe's job from the command line: the same job, executor and slots as the UI.

Runs are tagged with this process, so that the next run can tell a dead one from a live one without
a daemon.

What runs leave behind is taken away when a run begins, so that a root does not grow with them.
"""

import multiprocessing
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa
from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.event_log.sqlite import SqliteEventLogStorage

from siftline.assets.step import CANCELLED
from siftline.disk import ROOT_BYTES, check_folder, need, refused_database, sweep, writing
from siftline.locks import alone, held, warn_if_shared
from siftline.pipelines.launching import BORN_TAG as BORN_TAG
from siftline.pipelines.launching import HOST_TAG as HOST_TAG
from siftline.pipelines.launching import PID_TAG as PID_TAG
from siftline.pipelines.launching import is_dead, own_tags
from siftline.recipe.parse import Recipe
from siftline.rows.verified import file_hash
from siftline.workspace import ROOT_VARIABLE, Workspace

KEPT_ENDED = 50
"""Newest runs that ended well, with their events and logs; plots over time show as many."""
KEPT_BROKEN = 10
"""Newest runs that failed, were cancelled or killed."""
ORPHAN_SECONDS = 86400.0
"""Age from which files of a run that no record knows are nobody's."""
_ENDED = (dg.DagsterRunStatus.SUCCESS,)
_BROKEN = (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)


def forget_runs(instance: dg.DagsterInstance, home: Path) -> list[str]:
    """Deletes all but the newest finished runs, their events and their logs.

    A run that made what an asset shows now stays, however old: freshness and data versions are read
    from its events.

    Args:
        instance: Dagster's instance.
        home: Its folder.

    Returns:
        Ids of the deleted runs.
    """
    runs = [
        run.run_id
        for statuses, kept in ((_ENDED, KEPT_ENDED), (_BROKEN, KEPT_BROKEN))
        for run in instance.get_runs(dg.RunsFilter(statuses=list(statuses)))[kept:]
    ]
    shown = _shown(instance) if runs else set()
    gone = [run for run in runs if run not in shown]
    for run in gone:
        instance.delete_run(run)
        _remove_files(instance, home, run)
    if gone:
        _forget_checks(instance, gone)
    _remove_orphans(instance, home)
    return gone


def _shown(instance: dg.DagsterInstance) -> set[str]:
    """Runs that hold the latest materialization of an asset."""
    found = set()
    for record in instance.event_log_storage.get_asset_records():
        latest = record.asset_entry.last_materialization_record
        if latest is not None:
            found.add(latest.run_id)
    return found


def _forget_checks(instance: dg.DagsterInstance, runs: list[str]) -> None:
    """Deletes what checks said in runs, but for the last of each check; Dagster keeps it all."""
    storage = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage):
        return
    told = AssetCheckExecutionsTable.c
    last = sa.select(sa.func.max(told.id)).where(told.evaluation_event.is_not(None))
    last = last.group_by(told.asset_key, told.check_name)
    with storage.index_connection() as connection:
        connection.execute(
            sa.delete(AssetCheckExecutionsTable).where(told.run_id.in_(runs), told.id.not_in(last))
        )


def _remove_files(instance: dg.DagsterInstance, home: Path, run: str) -> None:
    """Removes the database of a run's events, which deleting them only empties, and its logs."""
    storage = instance.event_log_storage
    if isinstance(storage, SqliteEventLogStorage):
        shard = Path(storage.path_for_shard(run))
        for path in shard.parent.glob(f"{shard.name}*"):  # and what SQLite keeps beside it
            path.unlink(missing_ok=True)
    shutil.rmtree(home / "storage" / run, ignore_errors=True)


def _remove_orphans(instance: dg.DagsterInstance, home: Path) -> None:
    """Removes files of runs that were deleted by a process that was killed over it."""
    old = time.time() - ORPHAN_SECONDS
    named = {path.stem: path for path in (home / "history" / "runs").glob("*-*-*-*-*.db")}
    named |= {path.name: path for path in (home / "storage").glob("*-*-*-*-*")}
    for run, path in named.items():
        if path.stat().st_mtime < old and not instance.has_run(run):
            _remove_files(instance, home, run)


NAME_TAG = "siftline/run"
BEFORE = "83622257073983ae0645e495d2a81066d0b5f4138831dfddfba9d8acde51dcd8"
"""Hash of the settings that were copied before their hash was written down."""
POLL_SECONDS = 1.0
AGAIN_SECONDS = 30.0
"""Until a cancelled run that goes on is interrupted once more."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run_id: Dagster's id.
        success: Whether every asset and blocking check passed.
        error: One line on the first failure, or None.
    """

    run_id: str
    success: bool
    error: str | None


def instance_settings() -> Path:
    """The dagster.yaml that ships with the package, or the repository's in a checkout."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "dagster.yaml"
    return shipped if shipped.exists() else package.parents[1] / "dagster.yaml"


def prepare_home(workspace: Workspace) -> Path:
    """Makes the instance folder, with the settings that ship with this version.

    Settings that somebody edited stay as they are.
    """
    home = workspace.dagster_home
    check_folder(home)
    need(workspace.root, ROOT_BYTES, "a run")
    warn_if_shared(home)
    settings, made = home / "dagster.yaml", home / ".made"
    shipped = file_hash(instance_settings())
    copied = made.read_text(encoding="utf-8") or BEFORE if made.exists() else None
    if settings.exists() and (
        copied == shipped or (copied is not None and _edited(settings, copied))
    ):
        return home
    # Two first runs at once would both create the databases' tables.
    with held(home / ".lock", str(home), wait=True), writing(home):
        if not settings.exists() or (copied is not None and not _edited(settings, copied)):
            shutil.copyfile(instance_settings(), settings)
        with dg.DagsterInstance.from_config(str(home)):
            made.write_text(shipped, encoding="utf-8")
    return home


def _edited(settings: Path, copied: str) -> bool:
    """Whether somebody changed the settings; then they stay when a version ships others."""
    return file_hash(settings) != copied


def bury_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Marks runs of dead processes of this machine as failed and frees slots nobody works in.

    A killed run would block the next one for good where no daemon runs, and so would a step that
    crashed without giving its slot back.

    Returns:
        Ids of the runs that were buried.
    """
    # Between its record and its first step, a run counts as not started.
    alive = [
        dg.DagsterRunStatus.NOT_STARTED,
        dg.DagsterRunStatus.STARTING,
        dg.DagsterRunStatus.STARTED,
        dg.DagsterRunStatus.CANCELING,
    ]
    buried = []
    for run in instance.get_runs(dg.RunsFilter(statuses=alive)):
        if is_dead(run):
            message = f"process {run.tags[PID_TAG]} of the run is gone"
            if run.status == dg.DagsterRunStatus.CANCELING:
                instance.report_run_canceled(run, message=message)
            else:
                instance.report_run_failed(run, message=message)
            buried.append(run.run_id)
    for run_id in instance.event_log_storage.get_concurrency_run_ids():
        holder = instance.get_run_by_id(run_id)
        if holder is None or holder.is_finished:
            instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    return buried


def tidy(workspace: Workspace, instance: dg.DagsterInstance, say: Callable[[str], None]) -> None:
    """Takes away what earlier runs left and no later one needs."""
    gone = forget_runs(instance, workspace.dagster_home)
    if gone:
        say(f"Dagster's records of {len(gone)} old runs were deleted (see docs/integrity.md)")
    left = sweep(workspace.root)
    if left:
        say(f"{left} unfinished files of killed runs were removed")


def run_recipe(
    workspace: Workspace,
    recipe: Recipe,
    overrides: Sequence[str],
    say: Callable[[str], None],
    *,
    workers: int = 2,
    select: str | None = None,
) -> Outcome:
    """Materializes everything of a recipe and waits for it.

    Args:
        workspace: The root.
        recipe: The recipe, overrides applied.
        overrides: What `--set` changed; handed to every step.
        say: Takes lines of progress.
        workers: Model steps at a time; each waits for a slot of its pool besides.
        select: Dagster asset selection, such as `+key:"demo/duplicates"`; None is everything.
    """
    from dagster._core.definitions.reconstruct import build_reconstructable_job

    # A step process imports the script that began the run; one that begins another would wait for
    # the first for ever.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ValueError(
            f"recipe {recipe.name} is run where its own step imports the script that began it: put "
            'the call there under `if __name__ == "__main__":`'
        )
    os.environ["DAGSTER_HOME"] = str(prepare_home(workspace))
    os.environ[ROOT_VARIABLE] = str(workspace.root)
    job = build_reconstructable_job("siftline.pipelines.compose", "job_of", (recipe.name,))
    config = {
        "resources": {
            "siftline": {"config": {"root": str(workspace.root), "overrides": list(overrides)}}
        },
        "execution": {"config": {"max_concurrent": workers}},
        "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
    }
    tags = {**own_tags(), NAME_TAG: uuid.uuid4().hex}
    home = workspace.dagster_home
    with (
        writing(home),
        alone(
            workspace.recipe_lock(recipe.name),
            f"one run of recipe {recipe.name} at a time",
            f"`siftline run {recipe.name}` (process {os.getpid()})",
            say=say,
        ),
        dg.DagsterInstance.get() as instance,
    ):
        for dead in bury_dead_runs(instance):
            say(f"run {dead[:8]} was killed: marked failed, its slots freed")
        tidy(workspace, instance, say)
        watcher = _Watcher(instance, tags, say)
        with watcher:
            result = dg.execute_job(
                job,
                instance=instance,
                run_config=config,
                tags=tags,
                raise_on_error=False,
                asset_selection=_keys(recipe, select),
            )
            ended = instance.get_run_by_id(result.run_id)
        if ended is not None and ended.status in CANCELLED:
            told = f"run {result.run_id[:8]} was cancelled: begin it again to go on from there"
            return Outcome(result.run_id, False, told)
        return Outcome(result.run_id, result.success, watcher.error)


def _keys(recipe: Recipe, select: str | None) -> list[dg.AssetKey] | None:
    if select is None:
        return None
    from siftline.pipelines.compose import compose

    graph = compose([recipe]).resolve_asset_graph()
    try:
        keys = sorted(dg.AssetSelection.from_string(select).resolve(graph))
    except dg.DagsterError as error:
        raise ValueError(
            f"--select {select!r}: {error}: name assets as in "
            f'key:"{recipe.name}/duplicates", with + before it for all that it needs'
        ) from error
    if not keys:
        raise ValueError(f"--select {select!r} names no asset of recipe {recipe.name}")
    return keys


class _Watcher:
    """Follows the event log of a run in a thread and says what concerns a reader."""

    def __init__(
        self, instance: dg.DagsterInstance, tags: dict[str, str], say: Callable[[str], None]
    ) -> None:
        self.error: str | None = None
        self._instance, self._tags, self._say = instance, tags, say
        self._run_id: str | None = None
        self._cursor: str | None = None
        self._interrupted: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "_Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._drain()

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self._drain()
                self._end_if_cancelled()
            except Exception:  # the last `_drain`, in the run's own thread, meets it again
                return
            self._stop.wait(POLL_SECONDS)

    def _end_if_cancelled(self) -> None:
        """Interrupts the step that runs in this process, once the run was cancelled."""
        run = self._instance.get_run_by_id(self._run_id) if self._run_id else None
        if run is None or run.status not in CANCELLED or self._stop.is_set():
            return
        if self._interrupted is None:
            self._say(f"run {run.run_id[:8]} was cancelled: stopping")
        elif time.monotonic() - self._interrupted < AGAIN_SECONDS:
            return  # a library may have swallowed it
        self._interrupted = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    def _drain(self) -> None:
        if self._run_id is None:
            runs = self._instance.get_runs(dg.RunsFilter(tags=self._tags), limit=1)
            if not runs:
                return
            self._run_id = runs[0].run_id
        page = self._instance.get_records_for_run(self._run_id, cursor=self._cursor)
        self._cursor = page.cursor
        for record in page.records:
            self._tell(record.event_log_entry)

    def _tell(self, entry: Any) -> None:
        event = entry.dagster_event
        if event is None:
            if not entry.user_message.startswith("Dependencies for step"):
                self._say(entry.user_message)
        elif event.event_type_value == "STEP_FAILURE" and self.error is None:
            said = root_message(event.event_specific_data.error)
            # A step fails, too, where its events can't be stored.
            refused = refused_database(said, Path(self._instance.root_directory))
            self.error = f"{event.step_key}: {refused or said}"
        elif event.event_type_value == "ASSET_CHECK_EVALUATION":
            self._check(event.event_specific_data)
        elif event.is_engine_event and "pool" in event.engine_event_data.metadata:
            self._waits(event.step_key, event.engine_event_data.metadata["pool"].value)

    def _waits(self, step: str, pool: str) -> None:
        """Says what a step waits for, and who holds it."""
        slots = self._instance.event_log_storage.get_concurrency_info(pool).claimed_slots
        held = ", ".join(f"{slot.step_key} of run {slot.run_id[:8]}" for slot in slots)
        self._say(
            f"{step}: waits for a slot of pool {pool}" + (f", held by {held}" if held else "")
        )

    def _check(self, evaluation: Any) -> None:
        if evaluation.passed:
            return
        name = f"{evaluation.asset_key.to_user_string()} {evaluation.check_name}"
        said = evaluation.metadata.get("said")
        shown = {k: getattr(v, "value", v) for k, v in evaluation.metadata.items()}
        line = f"check {name} failed: {shown if said is None else said.value}"
        self.error = self.error or line
        self._say(line)


def root_message(error: Any) -> str:
    """What a step said in one line: the error under Dagster's wrappers.

    Not that error's own cause: who raised it from another has named the file and the remedy.
    """
    while error.cause is not None and (error.cls_name or "").startswith("Dagster"):
        error = error.cause
    message = " ".join(error.message.split())
    for prefix in ("ValueError: ", "OSError: "):
        message = message.removeprefix(prefix)
    return message
