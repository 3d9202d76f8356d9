"""The quality gate: finds out about each text what its rules ask, and has them decide."""

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.progress import Progress
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import expand
from siftline.rows import schema
from siftline.rows.verified import file_hash
from siftline.scoring.measures import degenerate as languages
from siftline.stages.canaries import Judged, measured
from siftline.stages.context import Context, StageRun, gather
from siftline.stages.quality_rules import text_rules
from siftline.stages.quality_rules.decide import COLUMNS, SCORE, QualityRules
from siftline.stages.quality_rules.text_rules import TextRules, WordList
from siftline.stages.scorers import quality


def quality_inputs(stage: Stage) -> dict[str, Any]:
    """What the gate's decisions depend on besides its options: libraries, and the list of words.

    Raises:
        ValueError: if a library is not installed or the list is not there.
    """
    options = stage.options
    assert isinstance(options, QualityRules)
    asked = [text_rules.LIBRARY] if options.languages else []
    asked += [languages.LIBRARY] if options.identify else []
    found: dict[str, Any] = {name: _version(name) for name in asked}
    if options.words is not None:
        found["words"] = file_hash(_list_of(options.words))
    return found


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        raise ValueError(
            f"quality_rules needs {library}, which is not here: {languages.REMEDY}"
        ) from None


def _list_of(path: str) -> Path:
    found = Path(expand(path))
    if not found.is_file():
        raise ValueError(f"words: no file {str(found)!r}: give a list, one word or phrase a line")
    return found


def run(context: Context) -> StageRun:
    """Removes rows whose text is of another language, repeats itself, or breaks another rule."""
    options = context.stage.options
    assert isinstance(options, QualityRules)
    quality_inputs(context.stage)
    look = looker(options)
    scores = {name: quality(context, name) for name in sorted(options.scores)}
    total = sum(len(context.in_play(bucket)) for bucket in context.buckets)
    progress = Progress(context.stage.name, total, context.emit)
    states, seen = [], []
    for bucket in context.buckets:
        view = schema.text_view(context.rows(bucket))
        judged = context.judged(bucket)
        asked = view if judged is None else view.filter(pl.col("id").is_in(list(judged)))
        found = _with_scores(look(asked), scores)
        states.append(options.summarise(found))
        earlier = _blank(view.filter(~pl.col("id").is_in(found["id"].to_list())))
        seen.append(pl.concat([found, earlier], how="diagonal").sort("id"))
        progress.advance(view.height)
    progress.close()
    plan = options.decide(states)
    run = gather(context, [options.apply(frame, plan) for frame in seen], plan.facts)

    def judge(planted: pa.Table) -> Judged:
        blank = {name: pl.DataFrame(schema=_SCORED) for name in scores}
        view = _with_scores(look(schema.text_view(planted)), blank)
        return options.apply(view, plan).decisions, {}

    run = StageRun(run.results, {**run.tables, **plan.tables}, run.facts)
    return measured(context, judge, run)


_SCORED = {"id": pl.String, "value": pl.Float64}


def _blank(view: pl.DataFrame) -> pl.DataFrame:
    """Rows judged before, in columns of `COLUMNS`: nothing speaks against them."""
    nothing = [pl.lit(None, dtype).alias(name) for name, dtype in list(COLUMNS.items())[2:]]
    return view.select("id", "source", *nothing)


def _with_scores(frame: pl.DataFrame, scores: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    for name, table in scores.items():
        column = table.select("id", pl.col("value").alias(SCORE + name))
        frame = frame.join(column, on="id", how="left", maintain_order="left")
    return frame


def looker(options: QualityRules) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """Loads what the rules need, and gives the function that looks at texts.

    Returns:
        From a text view (`schema.text_view`) to `quality_rules.COLUMNS`, in the same order; one
        row's line depends on no other row.

    Raises:
        ValueError: if a library is not installed, or a language is not known.
    """
    rules = {code: TextRules(code, of) for code, of in sorted(options.languages.items())}
    listed = None
    if options.words is not None:
        lines = _list_of(options.words).read_text(encoding="utf-8").splitlines()
        listed = WordList(lines)
    if options.identify:
        known = languages.known_languages()
        for code in (*options.languages, *options.keep):
            if code not in known:
                raise ValueError(f"language {code!r} is not known: known are {', '.join(known)}")

    def looked(row: dict[str, Any]) -> tuple[Any, ...]:
        prompt, response = row["prompt"] or "", row["response"] or ""
        both = f"{prompt}\n{response}"
        text = {"response": response, "prompt": prompt, "both": both}[options.text]
        language, share = _language(options, text, both)
        verdicts = [of.judge(text) for code, of in rules.items() if language in (None, code)]
        broken = verdicts[0] if verdicts and all(verdicts) else None
        verdict = (broken.rule, broken.value, broken.threshold) if broken else (None,) * 3
        count = listed.count(text) if listed else None
        return (row["id"], row["source"], language, share, count, *verdict)

    def look(view: pl.DataFrame) -> pl.DataFrame:
        return pl.DataFrame([looked(row) for row in view.to_dicts()], schema=COLUMNS, orient="row")

    return look


def _language(options: QualityRules, text: str, both: str) -> tuple[str | None, float | None]:
    """Language of a text, and the probability of those to keep; None where it can't be told."""
    if not options.identify:
        return next(iter(options.languages)), None
    parts = (languages.distinct(part) for part in (text, both))
    told = next((part for part in parts if languages.letters(part) >= options.min_letters), None)
    if told is None:
        return None, None
    found = languages.probabilities(told)
    share = sum(found.get(code, 0.0) for code in options.keep)
    named = {*options.languages, *options.keep}
    likely = (code for code, p in found.items() if code in named and p >= options.min_language)
    return next(likely, next(iter(found))), min(share, 1.0) if options.keep else None
