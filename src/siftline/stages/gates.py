"""Gates that need no model: duplicates, decontamination, verification."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline import schema
from siftline.ingest.pool import Pool
from siftline.kernels.keep import Keep, as_integers
from siftline.progress import Progress
from siftline.scoring.columns import Column, attach_leftovers, score_column
from siftline.scoring.verifiers import get_verifier, isolation_of
from siftline.scoring.verifiers.instructions import not_followed
from siftline.scratch import scratch_folder
from siftline.selectors.decontamination import Decontamination
from siftline.selectors.duplicate_state import Shelf
from siftline.selectors.duplicates import Duplicates, against
from siftline.selectors.selection import Selection
from siftline.selectors.verify import Verify
from siftline.stages.canaries import Judged, measured
from siftline.stages.context import Context, StageRun, pass_earlier, split_failed

LAST = 2**63 - 1
"""Priority of canaries, which come after all rows."""
UNDECIDED = ["verifier_error"]
"""Reasons that say the gate could not decide: such rows fail and are tried again."""


def gather(context: Context, selections: list[Selection], facts: dict[str, Any]) -> StageRun:
    """Joins the selections of all buckets; side tables are stacked."""
    names = sorted({name for selection in selections for name in selection.tables})
    stacked = {
        name: pl.concat([s.tables[name] for s in selections if name in s.tables]) for name in names
    }
    results = []
    for bucket, selection in enumerate(selections):
        decided = pass_earlier(selection, context.judged(bucket))
        results.append(split_failed(*without_undecided(decided)))
    vacuous = all(selection.vacuous for selection in selections)
    return StageRun(results, stacked, {**facts, "vacuous": vacuous})


def without_undecided(decided: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, str]]:
    """Decisions, and reasons by id of the rows that could not be decided."""
    open_ = pl.col("reason").is_in(UNDECIDED).fill_null(False)
    lost = decided.filter(open_)["id"].to_list()
    return decided.filter(~open_), dict.fromkeys(lost, UNDECIDED[0])


def duplicates(context: Context) -> StageRun:
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
    shelf, ids, scored = Shelf(scratch), [], 0
    for bucket in context.buckets:
        rows = context.rows(bucket)
        view = _compared(schema.text_view(rows, everything=True))
        order, known = keep_order(context.pool, bucket, rows, view, options.policy())
        scored += known
        shelf.add(options.summarise(view.with_columns(priority=order)))
        ids.append(view.select("id", "prompt_id", "answer", "answer_from"))
        progress.advance(view.height)
    if options.policy().policy == "score" and not scored:
        raise ValueError(
            f"stages.{context.stage.name}.keep={options.keep!r}: no row brings that field: name a "
            "column of the input that no mapping uses"
        )
    plan = options.decide(shelf.states, shelf.make_room)
    progress.close()
    selections = [options.apply(frame, plan) for frame in ids]

    def judge(planted: pa.Table) -> Judged:
        view = _compared(schema.text_view(planted, everything=True))
        view = view.with_columns(priority=pl.lit(LAST))
        earlier = against(options.summarise(view), shelf.states, plan.removed["id"])
        decided = options.decide(earlier)
        return options.apply(view, decided).decisions, {}

    return measured(context, judge, gather(context, selections, plan.facts))


def _compared(view: pl.DataFrame) -> pl.DataFrame:
    """Texts as they are compared: a prompt without a response stands on both sides."""
    alone = pl.col("response") == ""
    return view.with_columns(pl.when(alone).then("prompt").otherwise("response").alias("response"))


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


def decontamination(context: Context) -> StageRun:
    """Removes rows that overlap a target, dev or test set."""
    options = context.stage.options
    assert isinstance(options, Decontamination)
    references = []
    for role, spec in context.recipe.sets.items():
        view = schema.text_view(Pool(context.workspace.pool(spec.name)).all_rows())
        marks = [pl.lit(spec.name).alias("set"), pl.lit(role).alias("role")]
        references.append(view.with_columns(*marks))
    columns = ["set", "role", "id", "prompt_id", "prompt", "response"]
    empty = pl.DataFrame(schema=dict.fromkeys(columns, pl.String))
    index = options.index(pl.concat([empty, *(r.select(columns) for r in references)]))
    selections = [
        options.apply(schema.text_view(context.rows(bucket)), index) for bucket in context.buckets
    ]
    caught = Counter(r for s in selections for r in s.removed["reason"].to_list())
    facts = {
        "references": sum(r.height for r in references),
        "removed": dict(sorted(caught.items())),
    }

    def judge(planted: pa.Table) -> Judged:
        return options.apply(schema.text_view(planted), index).decisions, {}

    return measured(context, judge, gather(context, selections, facts))


def verify(context: Context) -> StageRun:
    """Checks responses against their independent answer."""
    options = context.stage.options
    assert isinstance(options, Verify)
    check = get_verifier(options.verifier, steps=False)
    total = sum(len(context.in_play(bucket)) for bucket in context.buckets)
    progress = Progress(context.stage.name, total, context.emit)

    broken = Counter()  # type: Counter[str]

    def checked(rows: pa.Table) -> Selection:
        view = schema.text_view(rows)
        verdicts = []
        for row in view.to_dicts():
            asked = row["answer"] is not None and row["answer_from"] == "independent"
            verdicts.append(check(row["response"], row["answer"]) if asked else None)
            if options.verifier == "instructions" and verdicts[-1] is not None:
                broken.update(not_followed(verdicts[-1]))
        return options.apply(
            view.select("id", "answer", "answer_from").with_columns(
                pl.Series("correct", [v.correct if v else None for v in verdicts], pl.Boolean),
                pl.Series("extracted", [v.extracted if v else None for v in verdicts], pl.String),
                pl.Series("said", [v.reason if v else None for v in verdicts], pl.String),
            )
        )

    selections = []
    for bucket in context.buckets:
        selections.append(checked(context.rows(bucket)))
        progress.advance(selections[-1].decisions.height)
    progress.close()
    totals = Counter()  # type: Counter[str]
    kept_open = Counter()  # type: Counter[str]
    for selection in selections:
        totals["checked"] += selection.facts["checked"]
        totals["without_independent_answer"] += selection.facts["without_independent_answer"]
        totals.update(selection.facts["removed"])
        kept_open.update(selection.facts["kept_open"])

    def judge(planted: pa.Table) -> Judged:
        return without_undecided(checked(planted).decisions)

    made: dict[str, Any] = {"verifier": options.verifier, **isolation_of(options.verifier)}
    made["kept_open"] = dict(sorted(kept_open.items()))
    if broken:
        made["not_followed"] = dict(sorted(broken.items()))
    run = gather(context, selections, {**made, **totals})
    return measured(context, judge, run)
