"""`siftline eval`: accuracy of a model on questions with answers, without a recipe.

The second part runs tasks of lm-evaluation-harness.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siftline.cli.options import columns_of, field_option, json_option, make_tracker, say
from siftline.ingest.source import Source

if TYPE_CHECKING:
    import polars as pl

HARNESS_ANSWERS, HARNESS_TABLE, HARNESS_FACTS, HARNESS_PICTURE = (
    "answers.parquet",
    "harness.csv",
    "harness.json",
    "harness.png",
)
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
    write_parquet(answers_of(found).to_arrow(), out / HARNESS_ANSWERS)
    table.write_csv(out / HARNESS_TABLE)
    picture = _tasks_picture(table)
    (out / HARNESS_PICTURE).unlink(missing_ok=True)  # of a run before this one
    if picture is not None:
        (out / HARNESS_PICTURE).write_bytes(picture)
    settings = {**asdict(config), "path": str(config.path) if config.path else None}
    result = {
        "model": str(model),
        "answers": str(out / HARNESS_ANSWERS),
        "picture": str(out / HARNESS_PICTURE) if picture is not None else None,
        "settings": {**settings, "tasks": list(config.tasks), "confidence": given["confidence"]},
        "versions": {
            "harness": found["lm_eval_version"],
            "transformers": found["transformers_version"],
        },
        "results": table.to_dicts(),
    }
    (out / HARNESS_FACTS).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result) if as_json else _tasks_text(result))


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


def _tasks_picture(table: "pl.DataFrame") -> bytes | None:
    """PNG of everything that is a share of right answers; None where nothing is."""
    from siftline.report import plots

    lines = table.filter(interval="wilson")
    if lines.is_empty():
        return None
    parts = lines.select("task", "metric", "filter").rows()
    names = [" ".join(part for part in line if part != "none") for line in parts]
    bounds = [lines[name].to_numpy() for name in ("value", "low", "high")]
    return plots.accuracy(names, {"model": (bounds[0], bounds[1], bounds[2])})


def _tasks_text(result: Mapping[str, Any]) -> str:
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


ANSWERS, TABLE, PICTURE = "answers.parquet", "accuracy.csv", "accuracy.png"
FACTS = "accuracy.json"


@click.command("eval")
@click.argument("model", type=Path)
@click.argument("files", metavar="FILE...", nargs=-1)
@click.option("--out", required=True, type=Path, help="Folder for the answers and the table.")
@click.option(
    "--engine", type=click.Choice(["transformers", "vllm"]), default="transformers",
    show_default=True, help="What runs the model.",
)  # fmt: skip
@click.option(
    "--answer-pattern",
    help="Regular expression with one group that finds the answer in a solution, such as "
    "'#### (.+)', for files without a column of answers.",
)
@field_option
@click.option("--verifier", default="math", show_default=True, help="Who judges the answers.")
@click.option("--level-column", default="level", show_default=True, help="Column of the level.")
@click.option("--max-new-tokens", default=512, show_default=True, help="Most tokens of an answer.")
@click.option("--batch-tokens", default=65536, show_default=True, help="Tokens of a batch.")
@click.option("--dtype", default="float32", show_default=True, help="Type of the weights.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda:0, ...")
@click.option("--confidence", default=0.95, show_default=True, help="Coverage of the intervals.")
@harness_options
@json_option
def evaluate(model: Path, files: tuple[str, ...], out: Path, as_json: bool, **given: Any) -> None:
    """Ask MODEL the questions in FILE... and grade its answers.

    FILE is a file, a folder, a glob or a URL in any format a recipe's pool reads, with responses
    or without; rows without an answer are left out and counted. Writes answers.parquet, one line a
    question with the response and its grade, and accuracy.csv with Wilson intervals by level and by
    source; accuracy.png shows the levels, accuracy.json says what was asked of which model, and
    how. Greedy.

    With --harness the questions are those of lm-evaluation-harness's tasks, which say themselves
    how to ask and grade. Writes answers.parquet, harness.csv, harness.json and harness.png.
    """
    if harness_asked(bool(files), given):
        evaluate_tasks(model, out, as_json, given)
        return
    from siftline.rows.shards import write_parquet, write_text
    from siftline.scoring.engines.base import ModelSpec
    from siftline.scoring.fingerprint import directory_digest
    from siftline.scoring.verifiers import get_verifier
    from siftline.stages.models import engines
    from siftline.training.evaluate import Evaluation, summarise_accuracy
    from siftline.training.evaluate import evaluate as ask

    settings = Evaluation(
        max_new_tokens=given["max_new_tokens"],
        verifier=given["verifier"],
        level_column=given["level_column"],
        batch_tokens=given["batch_tokens"],
    )
    verifier = get_verifier(settings.verifier)
    spec = ModelSpec(
        path=str(model.absolute()),
        engine=given["engine"],
        dtype=given["dtype"],
        device=given["device"],
    )
    columns = columns_of(given["fields"])
    sources = [Source(p, columns=columns, answer_pattern=given["answer_pattern"]) for p in files]
    questions, unanswered, reading = _questions(sources, out.absolute(), settings.level_column)
    tracker = make_tracker("evaluation", questions.height, "questions")
    with engines() as opened:
        answered = ask(opened.get(spec), questions, verifier, settings, tracker.reach)
    tracker.close()
    answered = answered.join(questions.select("id", "source"), on="id").sort("id")
    table = _table(answered, summarise_accuracy, given["confidence"])
    write_parquet(answered.to_arrow(), out / ANSWERS)
    table.write_csv(out / TABLE)
    (out / PICTURE).write_bytes(_picture(table))
    result = {
        "answers": str(out / ANSWERS),
        "questions": questions.height,
        "without_answer": unanswered,
        **reading,
        "accuracy": table.to_dicts(),
    }
    facts = {
        "model": str(model),
        "fingerprint": directory_digest(model.absolute()),
        "files": list(files),
        "settings": {
            **asdict(settings),
            "engine": given["engine"],
            "dtype": given["dtype"],
            "device": given["device"],
            "answer_pattern": given["answer_pattern"],
            "fields": columns,
            "confidence": given["confidence"],
        },
        "versions": {name: version(name) for name in ("siftline", "torch", "transformers")},
    }
    write_text(out / FACTS, json.dumps({**facts, **result}, indent=2) + "\n")
    click.echo(json.dumps(result) if as_json else _text(result))


def _questions(
    sources: Sequence[Source], out: Path, level_column: str
) -> "tuple[pl.DataFrame, int, dict[str, Any]]":
    """Rows with an answer, sorted by id: id, messages, tools, answer, source, level.

    Returns:
        The rows, how many have no answer, and what reading met with.

    Raises:
        ValueError: if no row has an answer.
    """
    import polars as pl

    from siftline.ingest.pool import PROVENANCE, Pool, PoolSpec, build_pool
    from siftline.rows.schema import messages_type

    out.mkdir(parents=True, exist_ok=True)
    rows = out / ".rows"
    shutil.rmtree(rows, ignore_errors=True)  # of a killed run
    read = (level_column,)
    build_pool(rows, PoolSpec("input", tuple(sources), holds="either"), read=read)
    pool = Pool(rows)
    lines = pool.all_rows(["id", "messages", "tools", "answer", "source"]).to_pylist()
    levels: dict[str, str] = {}
    for bucket in range(pool.buckets):
        for line in pool.read(PROVENANCE, bucket, ["id", "leftover"]).to_pylist():
            left = json.loads(line["leftover"] or "{}")
            if left.get(level_column) is not None:
                levels[line["id"]] = str(left[level_column])
    reading = pool.reading(read)
    shutil.rmtree(rows)
    asked = sorted((line for line in lines if line["answer"] is not None), key=lambda x: x["id"])
    if not asked:
        raise ValueError(
            f"none of {len(lines)} rows has an answer: name their column, --field answer=…, "
            "or --answer-pattern"
        )
    frame = pl.DataFrame(
        {
            "id": [line["id"] for line in asked],
            "messages": pl.Series([line["messages"] for line in asked], dtype=messages_type()),
            **{
                name: pl.Series([line[name] for line in asked], dtype=pl.String)
                for name in ("tools", "answer", "source")
            },
            level_column: pl.Series([levels.get(line["id"]) for line in asked], dtype=pl.String),
        }
    )
    return frame, len(lines) - len(asked), reading


def _table(answered: "pl.DataFrame", summarise: Any, confidence: float) -> "pl.DataFrame":
    """Accuracy over all, by level, and by source where there are several."""
    import polars as pl

    by_level = summarise(answered, confidence=confidence)
    tables = [by_level.with_columns(pl.lit(None, pl.String).alias("source"))]
    sources = answered["source"].drop_nulls().unique().sort().to_list()
    for source in sources if len(sources) > 1 else []:
        part = summarise(answered.filter(source=source), confidence=confidence)
        tables.append(part.with_columns(pl.lit(source).alias("source")))
    columns = ["source", "level", "n", "correct", "accuracy", "low", "high", "at_floor"]
    return pl.concat(tables).select(columns)


def _picture(table: "pl.DataFrame") -> bytes:
    """PNG of the accuracy by level, over all sources."""
    import polars as pl

    from siftline.report import plots

    lines = table.filter(pl.col("source").is_null())
    bounds = [lines[name].to_numpy() for name in ("accuracy", "low", "high")]
    return plots.accuracy(lines["level"].to_list(), {"model": (bounds[0], bounds[1], bounds[2])})


def _text(result: dict[str, Any]) -> str:
    lines = []
    for line in result["accuracy"]:
        name = " ".join(part for part in (line["source"], line["level"]) if part)
        share = f"{100 * line['accuracy']:5.1f} %"
        spread = f"{100 * line['low']:.1f} to {100 * line['high']:.1f}"
        floor = ", at the floor" if line["at_floor"] else ""
        lines.append(f"accuracy {name:<16} {share} ({spread}; {line['n']:,} questions{floor})")
    if result["without_answer"]:
        lines.append(f"note: {result['without_answer']:,} rows without an answer were left out")
    return "\n".join([*lines, f"answers: {result['answers']}"])
