"""Audit sheets: removed rows of a stage, drawn for a person to label.

The draw is by hash of the id, so a larger sheet begins with the rows of a smaller one and labels
that were given are never lost. The false-drop rate is that of the labelled rows with Wilson's
interval; it holds for all rows the stage removed, because the draw was uniform.
"""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline import schema, shards
from siftline.ingest.pool import Pool
from siftline.kernels.draws import gumbel_top_k, uniforms
from siftline.ledger import REMOVED, StageOutput
from siftline.recipe.kinds import Stage
from siftline.stages.context import Context
from siftline.training.intervals import wilson

RIGHT, WRONG, UNSURE = "right", "wrong", "unsure"
LABELS = (RIGHT, WRONG, UNSURE)
"""The row was removed rightly, wrongly, or a person can't tell."""
SHEET = (
    "label",
    "id",
    "reason",
    "value",
    "threshold",
    "prompt",
    "response",
    "answer",
    "matched_id",
    "matched_prompt",
    "matched_response",
)


def draw(context: Context, stage: Stage, output: StageOutput, n: int, seed: int) -> pl.DataFrame:
    """Draws at most n removed rows of a stage, with their texts and those of the rows they lost to.

    Returns:
        Columns of `SHEET` but `label`, in the order of the draw.

    Raises:
        ValueError: if the stage removed nothing.
    """
    gone = output.all_decisions().filter(pl.col("outcome") == REMOVED)
    if gone.is_empty():
        raise ValueError(f"stage {stage.name} removed no row: there is nothing to audit")
    ids = gone["id"].to_list()
    order = gumbel_top_k(uniforms(seed, f"audit {stage.name}", ids), ids, min(n, len(ids)))
    drawn = gone[order.astype(np.int64)].select("id", "reason", "value", "threshold", "matched_id")
    texts = _texts(context, {*drawn["id"], *drawn["matched_id"].drop_nulls()})
    matched = texts.select(
        matched_id="id", matched_prompt="prompt", matched_response="response"
    ).unique("matched_id")
    joined = drawn.join(texts, on="id", how="left", maintain_order="left")
    return joined.join(matched, on="matched_id", how="left", maintain_order="left").select(
        SHEET[1:]
    )


def _texts(context: Context, ids: set[str]) -> pl.DataFrame:
    """id, prompt, response and answer of rows of the pool, of a stage, or of an evaluation set."""
    wanted = pa.array(sorted(ids), pa.string())
    frames = []
    for bucket in sorted({schema.bucket_of(i, context.pool.buckets) for i in ids}):
        tables = [context.pool.rows(bucket)]
        tables += [output.added(bucket).select(schema.ROW.names) for _, output in context.before]
        rows = pa.concat_tables(table.cast(schema.ROW) for table in tables)
        view = schema.text_view(rows.filter(pa.compute.is_in(rows["id"], wanted)))
        frames.append(view.select("id", "prompt", "response", "answer"))
    # What a row overlapped stands in an evaluation set.
    sets = [spec for _, spec in context.recipe.sets.items()]
    for spec in sets:
        rows = Pool(context.workspace.pool(spec.name)).all_rows()
        view = schema.text_view(rows.filter(pa.compute.is_in(rows["id"], wanted)))
        frames.append(view.select("id", "prompt", "response", "answer"))
    return pl.concat(frames).unique("id", keep="first", maintain_order=True)


def read_labels(path: Path) -> dict[str, str]:
    """Labels by id; rows without one are left out.

    Raises:
        ValueError: if the file is no sheet, or a label is unknown.
    """
    csv.field_size_limit(2**31 - 1)  # a response may be long
    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a mark
        lines = csv.DictReader(file)
        if not {"label", "id"} <= set(lines.fieldnames or ()):
            raise ValueError(
                f"{path} has no columns label and id: name a sheet of `siftline audit`"
            )
        labels = {line["id"]: (line["label"] or "").strip().lower() for line in lines}
    for identity, label in labels.items():
        if label and label not in LABELS:
            raise ValueError(
                f"{path}: row {identity[:12]} is labelled {label!r}: use {', '.join(LABELS)}"
            )
    return {identity: label for identity, label in labels.items() if label}


def write_sheet(path: Path, drawn: pl.DataFrame, labels: Mapping[str, str]) -> None:
    """Writes a sheet as CSV, labels first; a spreadsheet opens it and runs nothing of it.

    A text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, SHEET, lineterminator="\n")
    writer.writeheader()
    for line in drawn.to_dicts():
        cells = {name: _inert(value) for name, value in line.items()}
        writer.writerow({"label": labels.get(line["id"], ""), **cells})
    shards.write_text(path, text.getvalue())


def _inert(value: Any) -> Any:
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value


def rate(drawn: pl.DataFrame, labels: Mapping[str, str], removed: int) -> dict[str, Any]:
    """The false-drop rate of the labelled rows.

    Args:
        drawn: Rows of the sheet.
        labels: By id.
        removed: Rows the stage removed in all.

    Returns:
        removed, drawn, labelled (right or wrong), unsure, false_drops, rate, low, high (95 %; null
        where nothing is labelled), and the same three counts by reason.
    """
    marked = drawn.with_columns(
        pl.col("id")
        .replace_strict(dict(labels), default=None, return_dtype=pl.String)
        .alias("label")
    )
    decided = marked.filter(pl.col("label").is_in([RIGHT, WRONG]))
    wrong = int((decided["label"] == WRONG).sum())
    interval = wilson(wrong, decided.height) if decided.height else None
    by_reason = decided.group_by("reason").agg(
        labelled=pl.len(), false_drops=(pl.col("label") == WRONG).sum()
    )
    return {
        "removed": removed,
        "drawn": drawn.height,
        "labelled": decided.height,
        "unsure": int((marked["label"] == UNSURE).sum()),
        "false_drops": wrong,
        "rate": interval.estimate if interval else None,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "by_reason": {line.pop("reason"): line for line in by_reason.sort("reason").to_dicts()},
    }
