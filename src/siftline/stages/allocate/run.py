"""Allocate: joins what earlier stages found out about each row, and spends the budget."""

from collections.abc import Sequence
from typing import Any

import polars as pl

from siftline.rows.ledger import StageResult
from siftline.stages.allocate.decide import AIMED, Allocate
from siftline.stages.context import Context, StageRun, split_failed
from siftline.stages.models import identity
from siftline.stages.scores import likelihoods


def run(context: Context) -> StageRun:
    """Chooses the rows of the curated version; rows without a likelihood fail."""
    options = context.stage.options
    assert isinstance(options, Allocate)
    scored, failed = likelihoods(context)
    clusters = _clusters(context)
    difficulty = _difficulty(context, options)
    verified = any(stage.kind == "verify" for stage, _ in context.before)
    # A sample is the target model's own where sampler and target are one model.
    own = identity(context.spec("sampler")) == identity(context.spec("target"))
    frames = []
    for bucket, scores in zip(context.buckets, scored, strict=True):
        rows = context.rows(bucket).select(["id", "prompt_id", "answer_from", "origin", "source"])
        frame = pl.from_arrow(rows)
        assert isinstance(frame, pl.DataFrame)
        proven = (pl.col("answer_from") == "independent") & pl.lit(verified)
        sampled = _made_by("rejection_sampling")
        # Own words in a row's place are verified, and compete as the row did.
        said_again = _made_by("s3ft")
        frame = frame.join(scores.select("id", "n_tokens", "logprob_mean"), on="id", how="inner")
        frame = frame.with_columns(
            pl.when(proven | sampled | said_again).then(True).alias("verified"),
            pl.when(sampled)
            .then(pl.lit("target" if own else "sampler"))
            .otherwise(pl.lit("pool"))
            .alias("origin"),
        )
        frame = frame.join(clusters, on="prompt_id", how="left")
        frames.append(frame.join(difficulty, on="prompt_id", how="left"))
    plan = options.decide([options.summarise(frame) for frame in frames])
    results, facts, tables = [], {}, {}
    for bucket, frame in zip(context.buckets, frames, strict=True):
        selection = options.apply(frame, plan)
        lost = set(context.in_play(bucket)) - set(frame["id"].to_list())
        results.append(split_failed(selection.decisions, {i: failed[i] for i in sorted(lost)}))
        facts, tables = selection.facts, selection.tables
    used = {"clusters": not clusters.is_empty(), "difficulty": not difficulty.is_empty()}
    facts |= {"used": used, "yield_per_prompt": _yield(frames), "draws": _drawn(frames, results)}
    return StageRun(results, tables, facts)


def _difficulty(context: Context, options: Allocate) -> pl.DataFrame:
    """Difficulty of each prompt and, where options are those of the draws, its target (`AIMED`).

    The stage that drew set its targets by its pilot. Set again by what its further draws showed,
    they would leave out answers that were paid for.
    """
    table = context.side_table("difficulty")
    if table is None:
        types = {"prompt_id": pl.String, "difficulty": pl.Float64, AIMED: pl.Int64}
        return pl.DataFrame(schema=types)
    drawn = [stage.options for stage, _ in context.before if stage.kind == "rejection_sampling"]
    aimed = pl.lit(None, pl.Int64)
    if options.targets == "scores" or (
        len(drawn) == 1
        and drawn[0].target == options.targets
        and (drawn[0].k, drawn[0].max_quantile) == (options.answers, options.max_quantile)
    ):
        aimed = pl.col("target")
    return table.select("prompt_id", "difficulty", aimed.alias(AIMED))


def _drawn(frames: Sequence[pl.DataFrame], results: Sequence[StageResult]) -> dict[str, Any]:
    """What came of the draws: how many competed and were kept, and why the others went."""
    sampled = pl.concat(frame.filter(pl.col("origin") != "pool").select("id") for frame in frames)
    decided = pl.concat(result.decisions.select("id", "kept", "reason") for result in results)
    draws = sampled.join(decided, on="id", how="inner")
    if draws.is_empty():
        return {}
    gone = draws.filter(~pl.col("kept"))["reason"].value_counts()
    kept = int(draws["kept"].sum())
    removed = dict(sorted(gone.iter_rows()))
    return {"offered": draws.height, "kept": kept, "removed": removed}


def _made_by(stage: str) -> pl.Expr:
    return pl.col("origin").str.starts_with(f"{stage} ").fill_null(False)


def _clusters(context: Context) -> pl.DataFrame:
    """Cluster of each shortlisted prompt; none where no diversity stage ran."""
    output = context.output("diversity")
    table = output.table("clusters") if output else None
    if table is None:
        return pl.DataFrame(schema={"prompt_id": pl.String, "cluster": pl.Int32})
    return table.select("prompt_id", "cluster")


def _yield(frames: list[pl.DataFrame]) -> float:
    """Rows in play per prompt in play: what the shortlist's keep_rate should say."""
    ids = pl.concat(frame.select("id", "prompt_id") for frame in frames)
    return ids.height / max(1, ids["prompt_id"].n_unique())
