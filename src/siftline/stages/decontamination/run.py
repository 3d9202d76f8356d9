"""The decontamination gate: rows that overlap a target, dev or test set."""

from collections import Counter

import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.rows import schema
from siftline.stages.canaries import Judged, measured
from siftline.stages.context import Context, StageRun, gather
from siftline.stages.decontamination.decide import Decontamination


def run(context: Context) -> StageRun:
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
