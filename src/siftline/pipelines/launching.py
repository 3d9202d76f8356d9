"""How runs begin and end; dagster.yaml names the launcher and the queue.

Runs of `siftline run` are no child of a code server, so Dagster's own launcher can neither stop
them nor tell whether they live. Both can be told here from the tags that they carry.
"""

import os
import platform
from contextlib import ExitStack
from pathlib import Path

import dagster as dg
from dagster._core.execution.context.system import PlanExecutionContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._core.run_coordinator import QueuedRunCoordinator, SubmitRunContext

from siftline.assets.shared import observe_files
from siftline.assets.step import FILES, OWNER, RECIPE, recipes_of, stop_if_cancelled
from siftline.locks import alone

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


def hold_recipes(stack: ExitStack, context: PlanExecutionContext, plan: ExecutionPlan) -> None:
    """Waits until no other run decides about the recipes of this one.

    The queue holds runs of a recipe's job back; this also holds what is launched past the queue.
    """
    steps = {
        step.tags[OWNER]: step
        for step in plan.get_steps_to_execute_in_topo_order()
        if OWNER in step.tags
    }
    for recipe, step in sorted(steps.items(), key=lambda item: item[0]):
        workspace = context.for_step(step).resources.siftline.workspace
        stack.enter_context(
            alone(
                workspace.recipe_lock(recipe),
                f"one run of recipe {recipe} at a time",
                f"run {context.run_id[:8]} (process {os.getpid()})",
                say=context.log.info,
                look=lambda: stop_if_cancelled(context.instance, context.run_id),
            )
        )


def observe(context: PlanExecutionContext, plan: ExecutionPlan) -> None:
    """Records what the files are that the steps will read, so that the assets count as fresh."""
    for step in plan.get_steps_to_execute_in_topo_order():
        if FILES in step.tags:
            siftline = context.for_step(step).resources.siftline
            recipe = siftline.shared(step.tags[RECIPE], step.tags[FILES])
            observe_files(context.instance, siftline.workspace, recipe, step.tags[FILES])
