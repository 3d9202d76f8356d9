"""The duplicates gate: exact and near duplicates of rows in play."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.disk import scratch_folder
from siftline.ingest.pool import Pool
from siftline.kernels.draws import hash64_each
from siftline.kernels.sets.keepers import Keep, as_integers
from siftline.progress import Progress
from siftline.rows import schema
from siftline.scoring.measures.columns import Column, attach_leftovers, score_column
from siftline.stages.canaries import Judged, measured
from siftline.stages.context import Context, StageRun, gather
from siftline.stages.duplicates.decide import Duplicates, against
from siftline.stages.duplicates.state import DuplicateState, StateFiles

LAST = 2**63 - 1
"""Priority of canaries, which come after all rows."""


def run(context: Context) -> StageRun:
    """Removes exact and near duplicates; rows that a stage added come last in keep order.

    What is known of many rows lies in files of this run until they are decided about.
    """
    with scratch_folder(context.workspace.root, context.stage.name) as scratch:
        return _duplicates(context, scratch)


def _duplicates(context: Context, scratch: Path) -> StageRun:
    options = context.stage.options
    assert isinstance(options, Duplicates)
    total = sum(len(context.in_play(bucket)) for bucket in context.buckets)
    progress = Progress(context.stage.name, total, context.emit)
    files, ids, scored = StateFiles(scratch), [], 0
    sources: set[str | None] = set()
    for bucket in context.buckets:
        rows = context.rows(bucket)
        view = _compared(schema.text_view(rows, everything=True))
        order, known = keep_order(context.pool, bucket, rows, view, options.policy())
        scored += known
        sources.update(view["source"].unique().to_list())
        files.add(options.summarise(view.with_columns(priority=order, tie=_ties(view))))
        ids.append(view.select("id", "prompt_id", "answer", "answer_from"))
        progress.advance(view.height)
    if options.policy().policy == "score" and not scored:
        raise ValueError(
            f"stages.{context.stage.name}.keep={options.keep!r}: no row brings that field: name a "
            "column of the input that no mapping uses"
        )
    if len(sources) > 1:
        files.states = [_by_id(state) for state in files.states]
    plan = options.decide(files.states, files.make_room)
    progress.close()
    selections = [options.apply(frame, plan) for frame in ids]

    def judge(planted: pa.Table) -> Judged:
        view = _compared(schema.text_view(planted, everything=True))
        view = view.with_columns(priority=pl.lit(LAST))
        earlier = against(options.summarise(view), files.states, plan.removed["id"])
        decided = options.decide(earlier)
        return options.apply(view, decided).decisions, {}

    return measured(context, judge, gather(context, selections, plan.facts))


def _compared(view: pl.DataFrame) -> pl.DataFrame:
    """Texts as they are compared: a prompt without a response stands on both sides."""
    alone = pl.col("response") == ""
    return view.with_columns(pl.when(alone).then("prompt").otherwise("response").alias("response"))


def _ties(view: pl.DataFrame) -> pl.Series:
    """A number of what each row says, in the order of prompt_ids.

    Ids depend on the source. Where all rows have one, its name, often a file's, decides nothing.
    """
    said = (view["response"].fill_null("") + "\x1f" + view["answer"].fill_null("")).to_list()
    prompts = view["prompt_id"].str.slice(0, 8).str.to_integer(base=16, dtype=pl.UInt64)
    low = pl.Series(hash64_each(said) >> np.uint64(31), dtype=pl.UInt64)
    return prompts * 2**32 + low


def _by_id(state: DuplicateState) -> DuplicateState:
    return replace(state, rows=state.rows.with_columns(tie=pl.lit(0, pl.UInt64)))


def keep_order(
    pool: Pool, bucket: int, rows: pa.Table, view: pl.DataFrame, keep: Keep
) -> tuple[pl.Series, int]:
    """Priorities of some rows: by the policy, rows that a stage added after all others.

    Args:
        pool: Where the rows, or those they were made from, are.
        bucket: Of the pool.
        rows: Columns of `schema.ADDED`.
        view: Their texts.
        keep: The policy.

    Returns:
        int64, shape (n,), below `LAST`; and how many of them have a score, where one is asked for.

    Raises:
        ValueError: if a score is no number, or copies of a row have different ones.
    """
    added = rows.column("origin").is_valid().to_numpy().astype(np.int64)
    if not keep.ordered:
        return pl.Series(added), 0
    column, known = None, 0
    if keep.policy == "source":
        column = rows.column("source").combine_chunks()
    elif keep.column is not None:
        held = attach_leftovers(rows.select(["id"]), pool.read("provenance", bucket))
        scores, _ = score_column(Column(keep.column), held)
        column = pa.array([scores.get(i) for i in view["id"]], pa.float64())
        known = len(scores)
    texts = view.select(pl.col("prompt") + pl.col("response")).to_series().to_arrow()
    # Two bits less of the policy leave room for who was added.
    order = (as_integers(keep.priority(texts, column)) >> 2) + (added << 62)
    return pl.Series(order), known
