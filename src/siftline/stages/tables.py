"""Shared score tables: one line per row of a pool, in the pool's buckets.

A table is what a scorer said about a pool; recipes on the same pool and model share it. Its
manifest names what it was made of, so a table of another pool version, model or option is never
read. Lines are written bucket by bucket and the manifest comes last: a reader sees a whole table
or none.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.rows.schema import bucket_of
from siftline.rows.shards import Manifest, PartWriter, RowHash, no_rows, read_bucket
from siftline.store.store import BUCKETS

FAILED = pa.schema([("id", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class ScoreTable:
    """Where a table lies, what its lines hold, and what it has to be made of.

    Attributes:
        folder: The table's folder.
        schema: Columns; the first is `id`.
        inputs: Everything the values depend on; JSON.
    """

    folder: Path
    schema: pa.Schema
    inputs: Mapping[str, Any]

    def found(self) -> Manifest | None:
        """The manifest, where the table is there and made of these inputs."""
        manifest = Manifest.found(self.folder / "manifest.json")
        if manifest is None:
            return None
        made_of = json.loads(json.dumps(self.inputs))  # as the manifest holds them: no tuples
        fits = manifest.info["inputs"] == made_of and not manifest.missing(self.folder)
        return manifest if fits else None

    def finished(self) -> Manifest | None:
        """The manifest, where `found` and no row is to be tried again."""
        manifest = self.found()
        return None if manifest is None or manifest.info["failed"] else manifest

    def reader(self) -> Callable[[int], pl.DataFrame] | None:
        """Reads one bucket of the pool; None where there is no table of these inputs."""
        manifest = self.found()
        if manifest is None:
            return None

        def read(bucket: int) -> pl.DataFrame:
            table = read_bucket(self.folder, manifest, "scores", bucket, schema=self.schema)
            frame = pl.from_arrow(table)
            assert isinstance(frame, pl.DataFrame)
            return frame

        return read

    def write(
        self,
        pool: Pool,
        scored: Iterable[tuple[int, tuple[pl.DataFrame, dict[str, str]]]],
        tally: Callable[[], Mapping[str, Any]],
    ) -> Manifest:
        """Writes the table.

        Args:
            pool: The pool; its buckets are the table's.
            scored: Store buckets in rising order, with the lines of their rows and the reasons of
                those that failed.
            tally: Called at the end: what it cost, for the manifest.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        writer, version = PartWriter(self.folder), RowHash()
        failed: dict[str, str] = {}
        counted = after = 0
        waiting: list[pl.DataFrame] = []

        def flush(until: int) -> None:
            """Writes the pool's buckets below `until`, whose rows are all there."""
            nonlocal after, waiting
            lines = pl.concat(waiting) if waiting else None
            for bucket in range(after, until):
                part = no_rows(self.schema)
                if lines is not None:
                    here = _of_bucket(lines, bucket, pool.buckets)
                    part = here.sort("id").to_arrow().select(self.schema.names).cast(self.schema)
                version.update(part)
                writer.add("scores", bucket, part)
            if until > after:
                after, waiting = until, []

        for store_bucket, (lines, reasons) in scored:
            # Both cuts go by the leading bits of the prompt id: a store bucket holds whole pool
            # buckets, or lies within one. The rows before this bucket's first are complete.
            flush(store_bucket * pool.buckets // BUCKETS)
            counted += lines.height
            failed |= reasons
            waiting.append(lines)
        flush(pool.buckets)
        lost = pl.DataFrame(
            {"id": list(failed), "reason": list(failed.values())},
            schema={"id": pl.String, "reason": pl.String},
        ).sort("id")
        writer.add("failed", 0, lost.to_arrow().cast(FAILED))
        # The rows' counts, not the questions': a row may need several, or none.
        info = {**tally(), "inputs": self.inputs, "scored": counted, "failed": lost.height}
        manifest = Manifest(version.hexdigest(), pool.buckets, tuple(writer.parts), info)
        manifest.save(self.folder / "manifest.json")
        return manifest


def reasons_of(folder: Path, manifest: Manifest) -> dict[str, int]:
    """Failed rows of a table by reason, most frequent first."""
    parts = [part for part in manifest.parts if part.table == "failed"]
    if not parts:
        return {}
    frame = pl.from_arrow(read_bucket(folder, manifest, "failed", 0, schema=FAILED))
    assert isinstance(frame, pl.DataFrame)
    counted = frame["reason"].value_counts().sort(["count", "reason"], descending=[True, False])
    return dict(counted.iter_rows())


def _of_bucket(lines: pl.DataFrame, bucket: int, buckets: int) -> pl.DataFrame:
    inside = [bucket_of(i, buckets) == bucket for i in lines["id"].to_list()]
    return lines.filter(pl.Series(inside, dtype=pl.Boolean))
