"""How Dagster's daemon and web server start and stop runs; dagster.yaml names the two classes.

Runs of `siftline run` are no child of a code server, so Dagster's own launcher can neither stop
them nor tell whether they live. Both can be told here from the tags that they carry.
"""

import os
import platform
from pathlib import Path

import dagster as dg
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._core.run_coordinator import QueuedRunCoordinator, SubmitRunContext

from siftline.assets.asking import OWNER
from siftline.assets.keys import recipes_of

HOST_TAG, PID_TAG, BORN_TAG = "siftline/host", "siftline/pid", "siftline/started"
"""Tags of a run of `siftline run`: its machine, its process, and when that process began."""


def own_tags() -> dict[str, str]:
    """Tags that name this process."""
    pid = os.getpid()
    return {
        HOST_TAG: platform.node(),
        PID_TAG: str(pid),
        BORN_TAG: born(pid) or "unknown",
    }


def born(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()[19]


def is_dead(run: dg.DagsterRun) -> bool:
    """Whether the process of a run of `siftline run` is gone; False where that can't be told."""
    pid, host = run.tags.get(PID_TAG), run.tags.get(HOST_TAG)
    if pid is None or host != platform.node():
        return False
    return born(int(pid)) != run.tags.get(BORN_TAG)


class RunLauncher(DefaultRunLauncher):
    """Dagster's own, that also stops runs of `siftline run` and notices dead ones."""

    def terminate(self, run_id: str) -> bool:
        """Asks a run to stop; one of `siftline run` looks for that every second."""
        run = self._instance.get_run_by_id(run_id) if self.has_instance else None
        if run is None or run.is_finished or PID_TAG not in run.tags:
            return bool(super().terminate(run_id))
        self._instance.report_run_canceling(run)
        if is_dead(run):
            self._instance.report_run_canceled(run, "its process is gone")
        return True

    @property
    def supports_check_run_worker_health(self) -> bool:
        """A killed process would hold its recipe's place in the queue for ever."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether the process of a run lives; code servers watch their own."""
        if is_dead(run):
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, f"process {run.tags[PID_TAG]}")
        return CheckRunHealthResult(WorkerStatus.RUNNING)


class RunQueue(QueuedRunCoordinator):
    """Dagster's own queue; runs launched on chosen assets count as runs of their recipe too."""

    def submit_run(self, context: SubmitRunContext) -> dg.DagsterRun:
        """Queues a run."""
        run = context.dagster_run
        recipes = recipes_of(run.asset_selection or ())
        if OWNER not in run.tags and len(recipes) == 1:
            self._instance.add_run_tags(run.run_id, {OWNER: recipes[0]})
        return super().submit_run(context)
