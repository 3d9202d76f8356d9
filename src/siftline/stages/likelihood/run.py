"""The likelihood gate: responses the target model finds too unlikely, or too likely."""

import polars as pl
import pyarrow as pa

from siftline.rows.ledger import StageResult
from siftline.stages.canaries import Judged, measured
from siftline.stages.context import Context, StageRun, pass_earlier, split_failed
from siftline.stages.likelihood.decide import LikelihoodOutliers
from siftline.stages.scores import likelihoods, score_rows


def run(context: Context) -> StageRun:
    """Drops likelihood outliers within source and length; rows without a score fail."""
    options = context.stage.options
    assert isinstance(options, LikelihoodOutliers)
    scored, failed = likelihoods(context)
    frames = []
    for bucket, frame in zip(context.buckets, scored, strict=True):
        frames.append(_with_source(frame, context.rows(bucket)))
    plan = options.decide([options.summarise(frame) for frame in frames])
    results: list[StageResult] = []
    table = []
    for bucket, frame in zip(context.buckets, frames, strict=True):
        selection = options.apply(frame, plan)
        here = set(context.in_play(bucket)) - set(frame["id"].to_list())
        decided = pass_earlier(selection, context.judged(bucket))
        results.append(split_failed(decided, {i: failed[i] for i in sorted(here)}))
        table.append(frame.select("id", "n_tokens", "logprob_mean", "perplexity"))
    facts = {**plan.facts, "vacuous": plan.vacuous}

    def judge(planted: pa.Table) -> Judged:
        fresh, lost = score_rows(context, lambda bucket: planted, 1, planted.num_rows)
        return options.apply(_with_source(fresh, planted), plan).decisions, lost

    run = StageRun(results, {"likelihood": pl.concat(table).sort("id")}, facts)
    return measured(context, judge, run)


def _with_source(scored: pl.DataFrame, rows: pa.Table) -> pl.DataFrame:
    sources = pl.from_arrow(rows.select(["id", "source"]))
    assert isinstance(sources, pl.DataFrame)
    return scored.join(sources.with_columns(pl.col("source").fill_null("")), on="id")
