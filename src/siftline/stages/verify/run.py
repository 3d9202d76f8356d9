"""The verify gate: responses with an independent answer are held to it."""

from collections import Counter
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.progress import Progress
from siftline.rows import schema
from siftline.rows.selection import Selection
from siftline.scoring.verifiers import get_verifier, isolation_of
from siftline.scoring.verifiers.instructions import not_followed
from siftline.stages.canaries import Judged, measured
from siftline.stages.context import Context, StageRun, gather, without_undecided
from siftline.stages.verify.decide import Verify


def run(context: Context) -> StageRun:
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
