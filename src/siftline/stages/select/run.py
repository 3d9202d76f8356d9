"""The select stage: offers a registered method what it reads, and takes its decision about rows."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.progress import Progress
from siftline.rows import schema
from siftline.rows.selection import Selection
from siftline.scoring.measures.embed import embed_conversations, embed_texts
from siftline.scoring.recorder import Recorder, unanswered
from siftline.selectors.less import Gradients
from siftline.selectors.method import MAX_ROWS, MAX_VALUES, RANKS
from siftline.selectors.spending import Budget
from siftline.stages.context import Context, StageRun, by_store_bucket, split_failed
from siftline.stages.models import over_buckets
from siftline.stages.scorers import quality
from siftline.stages.scores import likelihoods
from siftline.stages.select.gradients import Featured, featured, warmed_likelihoods
from siftline.stages.select.options import Select
from siftline.stages.select.rounds import Teacher

COURSE = ("members", "rounds")
"""Side tables of a method that trains: who was in which cluster and round, and what came of it."""
Vectors = tuple[dict[str, np.ndarray], dict[str, str]]


def run(context: Context) -> StageRun:
    """Keeps the rows that the method chooses; rows it can't read fail."""
    options = context.stage.options
    assert isinstance(options, Select)
    method, entry = options.configured(), options.entry
    failed: dict[str, str] = {}
    frames = [
        _offered(context.rows(bucket), text="text" in entry.needs) for bucket in context.buckets
    ]
    if options.likelihoods(context.recipe.budget.unit):
        scored, failed = likelihoods(context)
        frames = [f.join(s, on="id") for f, s in zip(frames, scored, strict=True)]
    for name in options.scorers():
        known = quality(context, name).select("id", pl.col("value").alias(name)).drop_nulls(name)
        have = set(known["id"].to_list())
        lost = [i for frame in frames for i in frame["id"].to_list() if i not in have]
        failed = {**dict.fromkeys(lost, f"no_{name}"), **failed}
        frames = [frame.join(known, on="id") for frame in frames]
    rows = sum(frame.height for frame in frames)
    _check_size(options, rows)
    more: dict[str, Any] = {}
    if options.warms:
        warm, unread, more = warmed_likelihoods(context, method)
        failed = {**unread, **failed}
        frames = [frame.join(warm, on="id") for frame in frames]
    if options.embeds:
        vectors, unread = _embedded(context, context.store_buckets(), rows)
        failed = {**unread, **failed}
        frames = _with_vectors(frames, vectors)
    made = None
    if options.differentiates:
        made = featured(context)
        failed, more = {**made.failed, **failed}, made.facts
        frames = _with_vectors(frames, made.pool)
    size = math.ceil(context.recipe.budget.size * options.oversampling)
    budget = Budget(size, context.recipe.budget.unit, "smaller")
    target = _target(context, options, made) if entry.targeted else None
    states = [method.summarise(frame) for frame in frames]
    if options.trains:
        teacher = Teacher(context, method)
        plan = method.refine(states, budget, teacher)
        more = {"unanswered": unanswered(teacher.lost.values())}
    else:
        plan = method.decide(states, budget, target)
    selections = [method.apply(frame, plan) for frame in frames]
    run = _run(context, selections, failed)
    return replace(run, facts={**run.facts, **more})


def _check_size(options: Select, rows: int) -> None:
    """Refuses what the method can't take, before anything is computed for it.

    Raises:
        ValueError: with the number of rows, or of values, and the limit.
    """
    # The registry's own limits are stated for one width of vectors, which is looked at below.
    stated = (options.embeds or options.differentiates) and not options.entry.own
    most = MAX_ROWS if stated else options.entry.limit
    if rows > most:
        raise ValueError(
            f"{rows} rows, and {options.method} takes {most} at most: draw a part with random "
            "first, or use a method without that limit"
        )
    if options.differentiates:
        asked = options.gradients or Gradients()
        _check_values(rows, asked.dimensions * (asked.epochs if asked.share > 0 else 1))


def _check_values(rows: int, width: int) -> None:
    if rows * width > MAX_VALUES:
        raise ValueError(
            f"{rows} rows x {width} dimensions is over {MAX_VALUES} values: draw a part with "
            "random first, or take fewer dimensions"
        )


def _run(context: Context, selections: list[Selection], failed: dict[str, str]) -> StageRun:
    options = context.stage.options
    results, ranks = [], []
    for bucket, selection in enumerate(selections):
        lost = set(context.in_play(bucket)) - set(selection.decisions["id"].to_list())
        results.append(split_failed(selection.decisions, {i: failed[i] for i in sorted(lost)}))
        if RANKS in selection.tables:
            ranks.append(selection.tables[RANKS])
    tables = {RANKS: pl.concat(ranks).sort("id")} if ranks else {}
    if options.trains:
        tables |= {
            name: selections[0].tables[name] for name in COURSE if name in selections[0].tables
        }
    facts: dict[str, Any] = {
        "method": options.method,
        **selections[0].facts,
        "vacuous": all(selection.vacuous for selection in selections),
    }
    return StageRun(results, tables, facts)


def narrow(rows: pa.Table, *, text: bool) -> pl.DataFrame:
    """`id`, `prompt_id`, `source`, words and characters of the response, and `text` if asked."""
    view = schema.text_view(rows)
    return view.select(
        "id",
        "prompt_id",
        "source",
        pl.col("response").str.count_matches(r"\S+").cast(pl.Int64).alias("n_words"),
        pl.col("response").str.len_chars().cast(pl.Int64).alias("n_chars"),
        *([whole_text().alias("text")] if text else []),
    )


def whole_text() -> pl.Expr:
    """Prompt and response of a text view, one below the other."""
    return pl.concat_str(["prompt", "response"], separator="\n")


def _offered(rows: pa.Table, *, text: bool) -> pl.DataFrame:
    """The columns of `narrow`; rows without a source are a source of their own."""
    return narrow(rows, text=text).with_columns(pl.col("source").fill_null(""))


def _embedded(context: Context, buckets: Any, total: int) -> Vectors:
    """Vectors of prompt and response, or of whole conversations, by id, and reasons by id."""
    progress = Progress(context.stage.name, total, context.emit, "embeddings")
    recorders = context.recorders("embedder", progress)

    def work(recorder: Recorder, bucket: int, rows: pa.Table) -> Vectors:
        if context.stage.options.entry.conversations:
            return embed_conversations(recorder, bucket, rows)
        view = schema.text_view(rows)
        texts = view.select("id", whole_text())
        return embed_texts(recorder, bucket, dict(texts.iter_rows()))

    vectors: dict[str, np.ndarray] = {}
    failed: dict[str, str] = {}
    for _, (found, reasons) in over_buckets(recorders, buckets, work):
        if found and not vectors:  # the first bucket tells the width
            _check_values(total, len(next(iter(found.values()))))
        vectors.update(found)
        failed.update(reasons)
    progress.close()
    return vectors, failed


def _with_vectors(frames: list[pl.DataFrame], vectors: dict[str, np.ndarray]) -> list[pl.DataFrame]:
    """The rows that have a vector, with it, float16.

    Vectors move: each leaves the mapping for the frame of its bucket, so no two copies of all of
    them are held.
    """
    width = len(next(iter(vectors.values()))) if vectors else 0
    kind = pl.Array(pl.Float16, width)
    done = []
    for frame in frames:
        marks = [i in vectors for i in frame["id"].to_list()]
        rows = frame.filter(pl.Series(marks, dtype=pl.Boolean))
        held = np.empty((rows.height, width), np.float16)
        for place, identity in enumerate(rows["id"].to_list()):
            held[place] = vectors.pop(identity)
        done.append(rows.with_columns(pl.Series("embedding", held, dtype=kind)))
    return done


def _target(context: Context, options: Select, made: Featured | None) -> pl.DataFrame:
    """The rows of all target sets, as the method reads them.

    Raises:
        ValueError: if the recipe has none.
    """
    sets = context.recipe.sets.target
    if not sets:
        raise ValueError(
            f"{context.stage.name}: {options.method} selects towards a target, and the recipe has "
            "none: add sets.target"
        )
    frames = []
    for spec in sets:
        pool = Pool(context.workspace.pool(spec.name))
        rows = pool.all_rows()
        frame = _offered(rows, text=True)
        if options.embeds:
            buckets = by_store_bucket(pool.rows, pool.buckets)
            vectors, failed = _embedded(context, buckets, rows.num_rows)
            if failed:
                first = min(failed)
                raise ValueError(
                    f"{len(failed)} rows of target set {spec.name} can't be embedded, first "
                    f"{first} ({failed[first]}): take them out"
                )
            (frame,) = _with_vectors([frame], vectors)
        if made is not None:
            (frame,) = _with_vectors([frame], dict(made.target))
        frames.append(frame)
    return pl.concat(frames).unique("id", keep="first", maintain_order=True)
