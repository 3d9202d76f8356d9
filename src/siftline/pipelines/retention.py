"""What runs leave behind is taken away when a run begins, so that a root does not grow with them.

A run of Dagster costs about a megabyte of events and logs, whether it ended or was killed, and a
killed process leaves what it was writing. Neither is needed by a later run.
"""

import shutil
import time
from pathlib import Path

import dagster as dg
import sqlalchemy as sa
from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.event_log.sqlite import SqliteEventLogStorage

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
