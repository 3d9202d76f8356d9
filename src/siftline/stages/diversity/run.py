"""Diversity: embeds prompts, clusters them, and picks those worth spending model calls on."""

import math

import numpy as np
import polars as pl

from siftline.progress import Progress
from siftline.rows import schema
from siftline.scoring.measures.embed import embed_texts
from siftline.scoring.recorder import Recorder
from siftline.stages.context import Context, StageRun, split_failed
from siftline.stages.diversity import decide as prompts_selector
from siftline.stages.diversity.decide import Shortlist
from siftline.stages.models import over_buckets
from siftline.stages.scorers import prompt_weights
from siftline.stages.scores import likelihoods


def _budget_rows(context: Context) -> int:
    """Rows the budget buys, at the mean response length of the rows in play."""
    budget = context.recipe.budget
    if budget.unit == "rows":
        return budget.size
    scored, _ = likelihoods(context)
    lengths = pl.concat(scored)["n_tokens"]
    return max(1, math.ceil(budget.size / float(lengths.mean())))  # type: ignore[arg-type]


def _embeddings(context: Context) -> tuple[pl.DataFrame, dict[str, str]]:
    """One line per prompt in play: prompt_id and embedding; reasons by prompt id."""
    spec = context.spec("embedder")
    views = [
        (bucket, schema.text_view(rows).unique("prompt_id", keep="first", maintain_order=True))
        for bucket, rows in context.store_buckets()
    ]
    total = sum(view.height for _, view in views)
    progress = Progress(context.stage.name, total, context.emit, "prompts")
    recorders = context.opened.recorders(spec, context.workspace.store, progress.advance)
    vectors: dict[str, np.ndarray] = {}
    failed: dict[str, str] = {}

    def work(
        recorder: Recorder, bucket: int, view: pl.DataFrame
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        # Plain text has no prompt: the text itself says what it is about.
        about = pl.when(pl.col("prompt") == "").then("response").otherwise("prompt")
        return embed_texts(recorder, bucket, dict(view.select("prompt_id", about).iter_rows()))

    for _, (found, reasons) in over_buckets(recorders, views, work):
        vectors.update(found)
        failed.update(reasons)
    progress.close()
    ids = sorted(vectors)
    values = np.stack([vectors[i] for i in ids]).astype(np.float32)
    width = values.shape[1]
    frame = pl.DataFrame(
        {"prompt_id": ids, "embedding": values},
        schema={"prompt_id": pl.String, "embedding": pl.Array(pl.Float32, width)},
    )
    return frame, failed


def run(context: Context) -> StageRun:
    """Keeps the rows of the prompts that the cluster quotas draw."""
    options = context.stage.options
    assert isinstance(options, Shortlist)
    frame, failed = _embeddings(context)
    if options.weight != "uniform":
        weights = prompt_weights(context, options.weight).rename({"weight": options.weight})
        frame = frame.join(weights, on="prompt_id", how="left").with_columns(
            pl.col(options.weight).fill_null(0.0)
        )
    budget_rows = _budget_rows(context)
    selector = options.diversity(budget_rows, frame.height)
    plan = selector.decide([selector.summarise(frame)])
    chosen = selector.apply(frame, plan)
    results = []
    for bucket in context.buckets:
        rows = context.rows(bucket).select(["id", "prompt_id"])
        pairs = pl.DataFrame({name: rows.column(name).to_pylist() for name in rows.column_names})
        lost = pairs.filter(pl.col("prompt_id").is_in(list(failed)))
        judged = pairs.filter(~pl.col("prompt_id").is_in(list(failed)))
        kept = prompts_selector.expand(chosen, judged)
        reasons = {i: failed[p] for i, p in lost.iter_rows()}
        results.append(split_failed(kept.decisions, reasons))
    facts = {
        **chosen.facts,
        "budget_rows": budget_rows,
        "embedder_engine": context.spec("embedder").engine,
        "vacuous": chosen.vacuous,
    }
    return StageRun(results, {"clusters": chosen.tables["clusters"]}, facts)
