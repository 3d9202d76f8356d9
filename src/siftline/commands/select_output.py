"""What a selection over plain files leaves: why every row stayed or went, and the records kept."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.dedup.arrow import without_views
from siftline.ingest.files import InputFile, input_files
from siftline.ingest.pool import PROVENANCE, QUARANTINE, Pool
from siftline.ingest.readers import Source
from siftline.ingest.records import Record, batches_of, read_records
from siftline.rows.shards import write_parquet

SELECTION, DATA = "selection.parquet", "data"
IDENTICAL = "identical_row"
"""Reason of a row that another, kept or removed by the method, is identical to."""
_LINES = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("rank", pa.int64()),
        pa.field("lost_to", pa.string()),
    ]
)


def write_selection(pool: Pool, decided: pl.DataFrame, path: Path) -> dict[str, Any]:
    """Writes one line for every place a row was read from, sorted by file and row.

    Of identical rows the first place carries the decision. What could not be read is there as well,
    without an id.

    Returns:
        `rows`, `kept`, and `removed`: counts by reason.
    """
    places = pl.concat([_frame(pool, PROVENANCE, b) for b in range(pool.buckets)])
    lines = places.select("id", "file", pl.col("line").alias("row")).sort("file", "row", "id")
    lines = lines.join(decided.rename({"matched_id": "lost_to"}), on="id", how="left")
    assert lines["kept"].null_count() == 0, "a row that was not decided"
    again = lines["id"].is_first_distinct().not_()
    lines = lines.with_columns(
        pl.when(again).then(None).otherwise(pl.col(name)).alias(name)
        for name in ("value", "rank", "lost_to")
    ).with_columns(
        kept=pl.col("kept") & ~again,
        reason=pl.when(again).then(pl.lit(IDENTICAL)).otherwise(pl.col("reason")),
    )
    unread = _frame(pool, QUARANTINE, 0).select("file", pl.col("line").alias("row"), "reason")
    lines = pl.concat([lines, unread.with_columns(kept=pl.lit(False))], how="diagonal")
    lines = lines.sort("file", "row", "id").select(_LINES.names)
    write_parquet(lines.to_arrow().cast(_LINES), path)
    tally = lines.filter(~pl.col("kept"))["reason"].value_counts().sort("reason")
    removed = dict(tally.iter_rows())
    return {"rows": lines.height, "kept": int(lines["kept"].sum()), "removed": removed}


def _frame(pool: Pool, table: str, bucket: int) -> pl.DataFrame:
    columns = ["id", "file", "line"] if table == PROVENANCE else ["file", "line", "reason"]
    frame = pl.from_arrow(pool.read(table, bucket, columns))
    assert isinstance(frame, pl.DataFrame)
    return frame


def write_data(sources: Sequence[Source], selection: Path, folder: Path) -> None:
    """Writes the kept records of each input file to a file of its own, all their columns kept.

    JSONL and JSON become JSONL, CSV stays CSV with its header, the binary formats become Parquet
    with their schema. Records come in the order they had.
    """
    folder.mkdir()
    kept = pl.read_parquet(selection, columns=["file", "row", "kept"]).filter("kept")
    for file in input_files(sources):
        rows = set(kept.filter(file=file.name)["row"].to_list())
        if rows:
            ending, write = _WRITERS[file.format]
            path = folder / f"{_flat(file.name)}{ending}"
            if path.exists():  # a.json beside a.jsonl
                path = folder / f"{file.name.replace('/', '__').replace('.', '_')}{ending}"
            write(file, rows, path)


def _flat(name: str) -> str:
    """A file's name without its endings, folders joined by two underscores."""
    base = name.replace("/", "__")
    for ending in (".gz", ".zst"):
        base = base.removesuffix(ending)
    stem, dot, _ = base.rpartition(".")
    return stem if dot and stem else base


def _kept(file: InputFile, rows: set[int]) -> Iterator[dict[str, Any]]:
    for item in read_records(file):
        if isinstance(item, Record) and item.line in rows:
            yield item.value


def _write_jsonl(file: InputFile, rows: set[int], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for record in _kept(file, rows):
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_csv(file: InputFile, rows: set[int], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer: csv.DictWriter[str] | None = None
        for record in _kept(file, rows):
            if writer is None:
                writer = csv.DictWriter(stream, list(record), lineterminator="\n")
                writer.writeheader()
            writer.writerow(record)


def _write_parquet(file: InputFile, rows: set[int], path: Path) -> None:
    parts, start = [], 1
    for batch in batches_of(file):
        marks = pa.array([start + i in rows for i in range(batch.num_rows)], pa.bool_())
        plain = without_views(batch)
        if plain.schema.equals(batch.schema):
            parts.append(pa.Table.from_batches([batch]).filter(marks))
        else:  # Arrow can't filter views
            parts.append(pa.Table.from_batches([plain]).filter(marks).cast(batch.schema))
        start += batch.num_rows
    write_parquet(pa.concat_tables(parts), path)


_WRITERS: dict[str, tuple[str, Callable[[InputFile, set[int], Path], None]]] = {
    "jsonl": (".jsonl", _write_jsonl),
    "json": (".jsonl", _write_jsonl),
    "csv": (".csv", _write_csv),
    "parquet": (".parquet", _write_parquet),
    "arrow": (".parquet", _write_parquet),
    "datasets": (".parquet", _write_parquet),
}
