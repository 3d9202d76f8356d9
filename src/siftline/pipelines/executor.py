"""The executor of every run, whoever started it.

A step runs in the run's own process, unless it is going to ask a model: then it gets a process of
its own, so that the model's memory and the card are free again when the step ends. Whether it will
ask one is looked up when its turn comes (`assets.step`); a step that only finds what is there
takes no process and no slot of its pool.

The loop follows Dagster's own multiprocess executor, whose parts it uses.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import dagster as dg
from dagster._core.events import DagsterEvent, EngineEventData
from dagster._core.execution.compute_logs import create_compute_log_file_key
from dagster._core.execution.context.system import PlanExecutionContext, PlanOrchestrationContext
from dagster._core.execution.context_creation_job import PlanExecutionContextManager
from dagster._core.execution.plan.active import ActiveExecution
from dagster._core.execution.plan.execute_plan import dagster_event_sequence_for_step
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.plan.step import ExecutionStep
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.base import Executor
from dagster._core.executor.child_process_executor import (
    ChildProcessCrashException,
    ChildProcessSystemErrorEvent,
    execute_child_process_command,
)
from dagster._core.executor.multiprocess import MultiprocessExecutorChildProcessCommand
from dagster._utils import get_run_crash_explanation
from dagster._utils.error import SerializableErrorInfo, serializable_error_info_from_exc_info

from siftline.assets.step import asks_a_model, stop_if_cancelled
from siftline.locks import LOOK_SECONDS
from siftline.pipelines.launching import hold_recipes, observe

MODEL_STEPS = 2
"""Model steps at a time unless a run says otherwise; each waits for a slot of its pool besides."""
PRELOADED = (
    "dagster._core.executor.multiprocess",
    "dagster._core.storage.sqlite_storage",
    "siftline.pipelines.compose",
    "siftline.scoring.engines.transformers_engine",
    "transformers.generation",
    "transformers.masking_utils",
    "transformers.models.auto.modeling_auto",
)
"""What the server that step processes are forked from has imported: no thread, no model.

The last two take three seconds of processor time, which every step that opens a model would pay.
"""
ENVIRONMENT = {
    "TQDM_DISABLE": "1",  # progress comes from the log, not from libraries' bars
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",  # nothing is fetched at run time
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads would eat the cores of the other steps
}
"""Set where a run begins, so that its steps and their workers inherit it; what is set stays."""


TICK_SECONDS = 0.05
STOPPING_SECONDS = 10.0
"""What a step process has to write down what it did before it is killed."""


@dg.executor(
    name="siftline",
    config_schema={
        "max_concurrent": dg.Field(
            int,
            default_value=MODEL_STEPS,
            description="Model steps at a time; the others run one by one beside them.",
        )
    },
    requirements=dg.multiple_process_executor_requirements(),
)
def step_executor(init_context: dg.InitExecutorContext) -> Executor:
    """Runs light steps in the run's process and model steps in processes of their own."""
    most = init_context.executor_config["max_concurrent"]
    assert isinstance(most, int)
    return StepExecutor(most)


def prepare_environment() -> None:
    """Sets what every step and its libraries should see; what is set already stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def die_with_parent() -> None:
    """Ends this step process when the run's process is gone; nothing keeps a card busy alone.

    The pipe to the run's process is watched, because the system's own signal (PR_SET_PDEATHSIG)
    follows the fork server, which lives as long as its steps.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, name="die-with-parent", daemon=True).start()


class _StepProcess(MultiprocessExecutorChildProcessCommand):
    """What a step process does."""

    def execute(self) -> Iterator[DagsterEvent]:
        die_with_parent()
        yield from super().execute()


@dataclass
class _Process:
    """A step in a process of its own: its events as they come, and how to end it."""

    step: ExecutionStep
    events: Iterator[Any]
    terminate: Any
    handle: BaseProcess | None = None
    decided: bool = False

    def end(self) -> None:
        """Asks the process to stop, and kills it where it does not."""
        self.terminate.set()
        if self.handle is not None:
            self.handle.join(STOPPING_SECONDS)
            if self.handle.is_alive():
                self.handle.kill()
                self.handle.join()


class _Slots(InstanceConcurrencyContext):
    """Slots of pools, claimed only by steps that will ask a model."""

    def __init__(self, context: PlanExecutionContext, most: int) -> None:
        super().__init__(context.instance, context.dagster_run)
        self._context, self._most = context, most
        self.asking: set[str] = set()

    def claim(self, concurrency_key: str, step_key: str, step_priority: int = 0) -> bool:
        """Whether the step may start; looked up anew each time, for what it needs may have come."""
        if not will_ask(self._context, step_key):
            self._forget(step_key)
            return True
        if len(self.asking) >= self._most or not super().claim(
            concurrency_key, step_key, step_priority
        ):
            return False
        self.asking.add(step_key)
        return True

    def free_step(self, step_key: str) -> None:
        super().free_step(step_key)
        self.asking.discard(step_key)

    def _forget(self, step_key: str) -> None:
        """Takes back a claim that is waiting."""
        if step_key in self._pending_claims:
            self._pending_claims.remove(step_key)
            self._instance.event_log_storage.free_concurrency_slot_for_step(self._run_id, step_key)


def will_ask(context: PlanExecutionContext, step_key: str) -> bool:
    """Whether a step is going to ask a model, by what is there now."""
    step = context.execution_plan.get_step_by_key(step_key)
    assert isinstance(step, ExecutionStep)
    resources = context.for_step(step).resources
    return asks_a_model(resources.siftline, step.tags)


class StepExecutor(Executor):
    """See the module; `most` is how many model steps run at a time."""

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"max_concurrent is {most}: give 1 or more")
        self._most = most

    @property
    def retries(self) -> RetryMode:
        """Steps with a retry policy are tried again."""
        return RetryMode.ENABLED

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[DagsterEvent]:
        """Runs every step of a plan; see `dagster.Executor`."""
        prepare_environment()
        here = PlanExecutionContextManager(
            job=plan_context.reconstructable_job,
            execution_plan=execution_plan,
            run_config=plan_context.run_config,
            dagster_run=plan_context.dagster_run,
            instance=plan_context.instance,
            retry_mode=self.retries,
        )
        yield from here.prepare_context()
        try:
            with ExitStack() as stack:
                context = here.get_context()
                assert isinstance(context, PlanExecutionContext)
                yield from _captured(stack, context, execution_plan)
                hold_recipes(stack, context, execution_plan)
                observe(context, execution_plan)
                slots = stack.enter_context(_Slots(context, self._most))
                active = stack.enter_context(
                    ActiveExecution(
                        execution_plan,
                        retry_mode=self.retries,
                        instance_concurrency_context=slots,
                    )
                )
                yield from _Run(self, plan_context, context, active, slots).events()
        finally:
            yield from here.shutdown_context()


def _captured(
    stack: ExitStack, context: PlanExecutionContext, plan: ExecutionPlan
) -> Iterator[DagsterEvent]:
    """What steps print in this process is kept as the run's log, for all of them together."""
    manager = context.instance.compute_log_manager
    key = manager.build_log_key_for_run(context.run_id, create_compute_log_file_key())
    steps = [step.key for step in plan.get_steps_to_execute_in_topo_order()]
    captured = stack.enter_context(manager.capture_logs(key))
    yield DagsterEvent.capture_logs(context, steps, key, captured)


class _Run:
    """The steps of one run: those that wait for their turn here, and those in processes."""

    def __init__(
        self,
        executor: StepExecutor,
        plan: PlanOrchestrationContext,
        context: PlanExecutionContext,
        active: ActiveExecution,
        slots: _Slots,
    ) -> None:
        self._executor, self._plan, self._context = executor, plan, context
        self._active, self._slots = active, slots
        self._turns: deque[ExecutionStep] = deque()
        self._processes: dict[str, _Process] = {}
        self._forks: BaseContext | None = None
        self._looked = time.monotonic()

    def events(self) -> Iterator[DagsterEvent]:
        """Everything that happens, until no step is left.

        Raises:
            DagsterExecutionInterruptedError: if the run was cancelled; its processes have ended.
        """
        try:
            while self._turns or self._processes or not self._active.is_complete:
                if self._active.check_for_interrupts():
                    raise dg.DagsterExecutionInterruptedError
                if time.monotonic() - self._looked > LOOK_SECONDS:
                    self._stop_if_cancelled()
                self._fetch()
                yield from self._active.concurrency_event_iterator(self._plan)
                # Those in processes first: a step here may take long.
                for process in list(self._processes.values()):
                    yield from self._follow(process)
                if self._turns:
                    yield from self._here(self._turns.popleft())
                elif not self._processes:
                    time.sleep(TICK_SECONDS)  # what is left waits for a slot, or to be retried
                yield from self._active.plan_events_iterator(self._plan)
            self._stop_if_cancelled()  # else the run would end as a success
        except BaseException:
            self._active.mark_interrupted()
            self._end_processes()
            raise

    def _stop_if_cancelled(self) -> None:
        self._looked = time.monotonic()
        stop_if_cancelled(self._context.instance, self._context.run_id)

    def _fetch(self) -> None:
        """Takes the steps whose turn has come."""
        for step in self._active.get_steps_to_execute():
            if step.key in self._slots.asking or will_ask(self._context, step.key):
                self._processes[step.key] = self._started(step)
            else:
                self._turns.append(step)

    def _here(self, step: ExecutionStep) -> Iterator[DagsterEvent]:
        """Runs a step in this process."""
        context = self._context.for_step(step, self._active.get_known_state())
        for event in dagster_event_sequence_for_step(context):
            yield event
            self._active.handle_event(event)
        self._active.verify_complete(self._plan, step.key)

    def _started(self, step: ExecutionStep) -> _Process:
        """Starts a step in a process of its own."""
        if self._forks is None:
            self._forks = multiprocessing.get_context("forkserver")
            module = self._plan.reconstructable_job.get_module()
            self._forks.set_forkserver_preload([*PRELOADED, *([module] if module else [])])
        terminate = self._forks.Event()
        command = _StepProcess(
            run_config=self._plan.run_config,
            dagster_run=self._plan.dagster_run,
            step_key=step.key,
            instance_ref=self._plan.instance.get_ref(),
            term_event=terminate,
            recon_pipeline=self._plan.reconstructable_job,
            retry_mode=self._executor.retries,
            known_state=self._active.get_known_state(),
            repository_load_data=self._context.execution_plan.repository_load_data,
        )
        return _Process(step, execute_child_process_command(self._forks, command), terminate)

    def _follow(self, process: _Process) -> Iterator[DagsterEvent]:
        """Takes the next thing that a step process says; waits a moment for it."""
        key = process.step.key
        try:
            said = next(process.events)
        except StopIteration:
            self._ended(key)
        except ChildProcessCrashException as crash:
            error = serializable_error_info_from_exc_info(sys.exc_info())
            context = self._plan.for_step(process.step)
            yield DagsterEvent.engine_event(
                context,
                get_run_crash_explanation(f"process of step {key}", crash.exit_code or 0),
                EngineEventData.engine_error(error),
            )
            yield from self._broke(process, error)
            self._ended(key)
        else:
            yield from self._took(process, said)

    def _took(self, process: _Process, said: Any) -> Iterator[DagsterEvent]:
        if isinstance(said, BaseProcess):
            process.handle = said
        elif isinstance(said, ChildProcessSystemErrorEvent):
            yield from self._broke(process, said.error_info)
        elif isinstance(said, DagsterEvent):
            yield said
            self._active.handle_event(said)
            process.decided |= (
                said.is_step_success or said.is_step_failure or said.is_step_up_for_retry
            )
            if said.is_resource_init_failure:
                assert isinstance(said.engine_event_data.error, SerializableErrorInfo)
                yield from self._broke(process, said.engine_event_data.error)

    def _broke(self, process: _Process, error: SerializableErrorInfo) -> Iterator[DagsterEvent]:
        """The step's failure, or that it is tried again, after an error outside its own code."""
        if process.decided:
            return
        process.decided = True
        event = self._executor.log_failure_or_retry_event_after_error(
            self._plan.for_step(process.step), error, self._active.get_known_state()
        )
        self._active.handle_event(event)
        yield event

    def _ended(self, key: str) -> None:
        del self._processes[key]
        self._active.verify_complete(self._plan, key)
        self._slots.free_step(key)

    def _end_processes(self) -> None:
        for process in self._processes.values():
            process.terminate.set()
        for key, process in self._processes.items():
            process.end()
            self._slots.free_step(key)
