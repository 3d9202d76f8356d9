"""`siftline eval`: accuracy of a model on questions with answers, without a recipe."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siftline.commands.harness import evaluate_tasks, harness_asked, harness_options
from siftline.commands.options import json_option, make_tracker
from siftline.commands.sources import columns_of, field_option
from siftline.ingest.source import Source

if TYPE_CHECKING:
    import polars as pl

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
    from siftline.scoring.engines import ModelSpec
    from siftline.scoring.fingerprint import directory_digest
    from siftline.scoring.verifiers import get_verifier
    from siftline.shards import write_parquet, write_text
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
    from siftline.schema import messages_type

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

    from siftline import plots

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
