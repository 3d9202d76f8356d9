"""The part of `siftline eval` that runs tasks of lm-evaluation-harness."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siftline.commands.options import say

if TYPE_CHECKING:
    import polars as pl

ANSWERS, TABLE, FACTS, PICTURE = "answers.parquet", "harness.csv", "harness.json", "harness.png"
OWN = ("harness_path", "limit", "num_fewshot", "apply_chat_template", "batch_rows")
OF_FILES = (
    "answer_pattern", "fields", "verifier", "level_column", "max_new_tokens", "batch_tokens",
)  # fmt: skip
"""What a task of the harness says itself, or has no use for."""
NAMES = {"fields": "field"}


def harness_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --harness and what goes with it."""
    options = (
        click.option(
            "--harness", metavar="TASK,…",
            help="Tasks of lm-evaluation-harness instead of FILE (extra harness).",
        ),
        click.option(
            "--harness-path", type=click.Path(path_type=Path),
            help="Folder with task files of your own; they may run Python.",
        ),
        click.option(
            "--limit", type=click.IntRange(1),
            help="Only the first questions of each task, to try it out.",
        ),
        click.option(
            "--num-fewshot", type=click.IntRange(0), help="Examples [default: as the task says]"
        ),
        click.option(
            "--apply-chat-template", is_flag=True, help="Ask through the model's chat template."
        ),
        click.option(
            "--batch-rows", type=click.IntRange(1), default=16, show_default=True,
            help="Requests of a batch, with --harness.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def harness_asked(files: bool, given: Mapping[str, Any]) -> bool:
    """Whether tasks are asked for instead of files.

    Raises:
        ValueError: if both are, or neither, or an option belongs to the other.
    """
    tasks = given["harness"] is not None
    if tasks == files:
        raise ValueError(
            "FILE and --harness are two evaluations: run them one by one"
            if tasks
            else "nothing to ask: give FILE..., or --harness TASK"
        )
    context = click.get_current_context()
    for name in OF_FILES if tasks else OWN:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = "--" + NAMES.get(name, name).replace("_", "-")
            why = "a task says that itself" if tasks else "it belongs to --harness"
            raise ValueError(f"{option} does not go with this evaluation: {why}; leave it out")
    return tasks


def evaluate_tasks(model: Path, out: Path, as_json: bool, given: Mapping[str, Any]) -> None:
    """Runs the tasks of `given` and writes the table, the answers and a picture."""
    from siftline.rows.shards import write_parquet
    from siftline.training.harness import (
        Harness,
        answers_of,
        check_installed,
        check_model,
        load_tasks,
        run_harness,
        summarise_harness,
    )

    config = Harness(
        tasks=tuple(name.strip() for name in given["harness"].split(",")),
        path=given["harness_path"],
        limit=given["limit"],
        shots=given["num_fewshot"],
        chat_template=given["apply_chat_template"],
        engine=given["engine"],
        dtype=given["dtype"],
        device=given["device"],
        batch_rows=given["batch_rows"],
    )
    check_installed(config.engine)
    check_model(model)  # before the tasks, which take longer to load
    say(f"harness: {', '.join(config.tasks)}")
    with _result_alone():
        loaded = load_tasks(config)
        found = run_harness(model.absolute(), config, loaded)
    table = summarise_harness(found, given["confidence"])
    out.mkdir(parents=True, exist_ok=True)
    write_parquet(answers_of(found).to_arrow(), out / ANSWERS)
    table.write_csv(out / TABLE)
    picture = _picture(table)
    (out / PICTURE).unlink(missing_ok=True)  # of a run before this one
    if picture is not None:
        (out / PICTURE).write_bytes(picture)
    settings = {**asdict(config), "path": str(config.path) if config.path else None}
    result = {
        "model": str(model),
        "answers": str(out / ANSWERS),
        "picture": str(out / PICTURE) if picture is not None else None,
        "settings": {**settings, "tasks": list(config.tasks), "confidence": given["confidence"]},
        "versions": {
            "harness": found["lm_eval_version"],
            "transformers": found["transformers_version"],
        },
        "results": table.to_dicts(),
    }
    (out / FACTS).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result) if as_json else _text(result))


@contextlib.contextmanager
def _result_alone() -> Iterator[None]:
    """Sends what libraries, and processes of theirs, print on stdout to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _picture(table: "pl.DataFrame") -> bytes | None:
    """PNG of everything that is a share of right answers; None where nothing is."""
    from siftline import plots

    lines = table.filter(interval="wilson")
    if lines.is_empty():
        return None
    parts = lines.select("task", "metric", "filter").rows()
    names = [" ".join(part for part in line if part != "none") for line in parts]
    bounds = [lines[name].to_numpy() for name in ("value", "low", "high")]
    return plots.accuracy(names, {"model": (bounds[0], bounds[1], bounds[2])})


def _text(result: Mapping[str, Any]) -> str:
    lines, cut = [], False
    width = max((len(f"{x['task']} {x['metric']}") for x in result["results"]), default=0)
    for line in result["results"]:
        name = f"{line['task']} {line['metric']}"
        value = "   n/a" if line["value"] is None else f"{line['value']:6.3f}"
        known = line["interval"] is not None
        spread = f"{line['low']:.3f} to {line['high']:.3f}; " if known else ""
        asked = f"{line['n']:,} questions"
        if line["n"] < line["questions"]:
            asked, cut = f"{line['n']:,} of {line['questions']:,} questions", True
        shots = "" if line["shots"] is None else f", {line['shots']} shots"
        how = "" if line["filter"] == "none" else f", {line['filter']}"
        lines.append(f"{name:<{width}} {value} ({spread}{asked}{shots}{how})")
    if cut and result["settings"]["limit"]:
        lines.append("note: the first questions of a task are no random sample of it")
    return "\n".join([*lines, f"answers: {result['answers']}"])
