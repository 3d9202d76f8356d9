"""The ledger: what every stage decided about every row, and whether the numbers close.

A stage instance writes one decision per row that came in or was added, so that

    in + added = kept + removed + failed

can be checked rather than believed. Decisions lie in the pool's buckets. `story` follows one id
through the pool's provenance, its quarantine, and every stage.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.rows import schema
from siftline.rows.selection import DECISION
from siftline.rows.shards import Manifest, PartWriter, RowHash, read_bucket, read_part
from siftline.rows.verified import content_hash

DECISIONS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),  # kept, removed or failed
        pa.field("added", pa.bool_(), nullable=False),  # the stage itself brought the row
        pa.field("reason", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("threshold", pa.float64()),
        pa.field("matched_id", pa.string()),
    ]
)
KEPT, REMOVED, FAILED = "kept", "removed", "failed"


@dataclass(frozen=True)
class Accounting:
    """Row counts of one stage instance."""

    rows_in: int
    added: int
    kept: int
    removed: int
    failed: int

    @property
    def closes(self) -> bool:
        """Whether in + added = kept + removed + failed."""
        return self.rows_in + self.added == self.kept + self.removed + self.failed

    def as_json(self) -> dict[str, int]:
        """Counts under the names reports use."""
        counts = asdict(self)
        return {"in": counts.pop("rows_in"), **counts}


@dataclass(frozen=True)
class StageResult:
    """What a stage hands to the ledger for one bucket.

    Attributes:
        decisions: One line per incoming row, columns of `selection.DECISION`.
        failed: Reason by id, for incoming rows the stage could not decide; they are tried again
            next run. Such ids must not occur in `decisions`.
        added: Rows the stage brought (schema.ADDED); kept as they are.
    """

    decisions: pl.DataFrame
    failed: dict[str, str] = field(default_factory=dict)
    added: pa.Table | None = None

    def to_table(self) -> pa.Table:
        """Lines of `DECISIONS`, sorted by id."""
        outcome = pl.when("kept").then(pl.lit(KEPT)).otherwise(pl.lit(REMOVED)).alias("outcome")
        flat = self.decisions.with_columns(outcome, pl.lit(False).alias("added"))
        frames = [flat.select(DECISIONS.names)]
        blank = {name: pl.lit(None, DECISION[name]) for name in DECISIONS.names[3:]}
        if self.failed:
            lines = pl.DataFrame({"id": list(self.failed), "why": list(self.failed.values())})
            lines = lines.with_columns(
                pl.lit(FAILED).alias("outcome"), pl.lit(False).alias("added"), **blank
            )
            frames.append(lines.with_columns(reason="why").select(DECISIONS.names))
        if self.added is not None and self.added.num_rows:
            lines = pl.DataFrame({"id": self.added.column("id").to_pylist()})
            lines = lines.with_columns(
                pl.lit(KEPT).alias("outcome"), pl.lit(True).alias("added"), **blank
            )
            frames.append(lines.select(DECISIONS.names))
        merged = pl.concat(frames).sort("id")
        assert merged["id"].n_unique() == merged.height, "a row was decided twice"
        return merged.to_arrow().cast(DECISIONS)


class StageOutput:
    """Read access to what one stage instance wrote."""

    def __init__(self, manifest_path: Path) -> None:
        self.folder = manifest_path.parent / "parts"
        self.manifest = Manifest.load(manifest_path)

    @property
    def accounting(self) -> Accounting:
        """The stage's row counts."""
        return Accounting(**self.manifest.info["accounting"])

    @property
    def facts(self) -> dict[str, Any]:
        """Thresholds, quotas and whatever else the stage reports."""
        return self.manifest.info["facts"]

    def decisions(self, bucket: int) -> pl.DataFrame:
        """Decisions of one bucket, sorted by id."""
        table = read_bucket(self.folder, self.manifest, "decisions", bucket, schema=DECISIONS)
        return _frame(table)

    def all_decisions(self) -> pl.DataFrame:
        """Decisions of all buckets, sorted by id."""
        return pl.concat(self.decisions(b) for b in range(self.manifest.buckets))

    def added(self, bucket: int) -> pa.Table:
        """Rows of one bucket that the stage brought."""
        return read_bucket(self.folder, self.manifest, "added", bucket, schema=schema.ADDED)

    def table(self, name: str) -> pl.DataFrame | None:
        """A side table, or None where the stage wrote none of that name."""
        for part in self.manifest.parts:
            if part.table == f"side_{name}":
                return _frame(read_part(self.folder, part))
        return None


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def write_stage(
    manifest_path: Path,
    results: Sequence[StageResult],
    *,
    rows_in: int,
    tables: dict[str, pl.DataFrame],
    facts: dict[str, Any],
    identity: dict[str, Any],
) -> StageOutput:
    """Writes the output of a stage, one result per bucket; the manifest comes last.

    Args:
        manifest_path: Where the manifest goes; parts lie in `parts/` beside it.
        results: One result per bucket, in bucket order.
        rows_in: Rows that were in play when the stage began, counted by the caller.
        tables: Side tables over the whole pool.
        facts: JSON values to report.
        identity: Kind, configuration and inputs of the stage.
    """
    (manifest_path.parent / "parts").mkdir(parents=True, exist_ok=True)
    writer = PartWriter(manifest_path.parent / "parts")
    # Each table is hashed over all buckets for itself, so that the cut does not show.
    hashes, counts = (RowHash(), RowHash()), dict.fromkeys((KEPT, REMOVED, FAILED), 0)
    added = 0
    for bucket, result in enumerate(results):
        decided = result.to_table()
        hashes[0].update(decided)
        writer.add("decisions", bucket, decided)
        for outcome in decided.column("outcome").to_pylist():
            counts[outcome] += 1
        if result.added is not None:
            rows = result.added.sort_by("id").cast(schema.ADDED)
            hashes[1].update(rows)
            writer.add("added", bucket, rows)
            added += rows.num_rows
    for name, frame in sorted(tables.items()):
        writer.add(f"side_{name}", 0, frame.to_arrow())
    accounting = Accounting(rows_in=rows_in, added=added, **counts)
    info = {"accounting": asdict(accounting), "facts": facts, "identity": identity}
    version = content_hash([digest.hexdigest() for digest in hashes])
    Manifest(version, len(results), tuple(writer.parts), info).save(manifest_path)
    return StageOutput(manifest_path)


def reasons(decisions: pl.DataFrame) -> dict[str, int]:
    """How many rows went for which reason, most first."""
    gone = decisions.filter(pl.col("outcome") != KEPT)
    counted = gone.group_by("reason").len().sort(["len", "reason"], descending=[True, False])
    return {row["reason"]: row["len"] for row in counted.to_dicts()}


@dataclass(frozen=True)
class Chapter:
    """One line of a row's story."""

    stage: str
    outcome: str
    detail: dict[str, Any]

    def __str__(self) -> str:
        """One readable line: stage, outcome, and what decided."""
        shown = ", ".join(f"{k}={v}" for k, v in self.detail.items() if v is not None)
        return f"{self.stage:<24} {self.outcome:<9} {shown}".rstrip()


def stage_chapters(
    identity: str, stages: Sequence[tuple[str, StageOutput]], bucket_count: int
) -> Iterator[Chapter]:
    """What each stage said about one id, in order, up to the one that ended its way."""
    bucket = schema.bucket_of(identity, bucket_count)
    for name, output in stages:
        line = output.decisions(bucket).filter(pl.col("id") == identity).to_dicts()
        if not line:
            continue
        detail = {k: line[0][k] for k in ("reason", "value", "threshold", "matched_id")}
        if line[0]["added"]:
            rows = {row["id"]: row for row in output.added(bucket).to_pylist()}
            detail |= {k: rows[identity][k] for k in ("origin", "parent_id")}
            yield Chapter(name, "added", detail)
        else:
            yield Chapter(name, line[0]["outcome"], detail)
