"""Likelihood: the shared score table of a pool, and what stages read of it.

The table covers the whole pool once and is shared by recipes. Rows that a stage adds later are
scored through the same store when a gate asks for them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.progress import Progress
from siftline.rows.shards import Manifest
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.measures import likelihood
from siftline.scoring.measures.likelihood import COLUMNS, Likelihood
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import trimmed_ids
from siftline.stages.context import Context, by_store_bucket
from siftline.stages.models import Engines, identity
from siftline.stages.parallel import total
from siftline.stages.responses import score_buckets
from siftline.stages.tables import ScoreTable

VERSION = 3
"""Raise it when the table's columns change, or which rows have a score."""
TABLE = pa.schema(
    [
        ("id", pa.string()),
        ("key", pa.string()),
        ("n_tokens", pa.int32()),
        *((name, pa.float64()) for name, kind in COLUMNS.items() if kind == pl.Float64),
        ("pooled", pa.binary()),
    ]
)
Observe = Callable[[int, dict[str, Any]], None]
"""Takes a finished store bucket and its numbers."""


def likelihood_table(folder: Path, pool: Pool, spec: ModelSpec, asked: Likelihood) -> ScoreTable:
    """The score table of a pool under a model."""
    inputs = {
        "table": VERSION,
        "likelihood": likelihood.VERSION,
        "pool": pool.version,
        "model": identity(spec),
        "buckets": pool.buckets,
        "asked": {"turns": asked.turns, "details": list(asked.details)},
    }
    return ScoreTable(folder, TABLE, inputs)


def score_pool(
    table: ScoreTable,
    pool: Pool,
    spec: ModelSpec,
    asked: Likelihood,
    store: Path,
    opened: Engines,
    emit: Callable[[str], None],
    observe: Observe = lambda bucket, numbers: None,
) -> tuple[Manifest, bool]:
    """Scores every row of a pool that the store doesn't know, and writes the score table.

    Args:
        table: The table to write.
        pool: The pool.
        spec: The target model; several devices share the buckets.
        asked: Which turns, and what beside the log-probability.
        store: Folder of the store.
        opened: Engines of this process.
        emit: Takes lines of progress.
        observe: Takes the numbers of each bucket.

    Returns:
        The table's manifest, and whether it was written now. A table with failed rows is made
        again, which asks the model for those rows alone.
    """
    found = table.finished()
    if found is not None:
        return found, False
    prompts = pool.manifest.info.get("holds") == "prompts"  # which have nothing to score
    total_rows = 0 if prompts else 2 * pool.manifest.rows("rows")
    progress = Progress("likelihood", total_rows, emit, "forward rows")
    recorders = opened.recorders(spec, store, progress.advance)
    buckets = iter(()) if prompts else by_store_bucket(pool.rows, pool.buckets)
    trims = _Trims(recorders[0])
    scored = score_buckets(recorders, trims.seen(buckets), asked, progress.advance)
    manifest = table.write(
        pool,
        observed(trims.scored(scored), observe),
        lambda: {**asdict(total(recorders)), "trimmed": len(trims.ids)},
    )
    progress.close()
    return manifest, True


class _Trims:
    """Counts the scored rows whose response the chat template takes white space off.

    Attributes:
        ids: Of those rows.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._tokenizer, self._template = recorder.engine.tokenizer, recorder.spec.template
        self.ids: set[str] = set()

    def seen(self, buckets: Iterable[tuple[int, pa.Table]]) -> Iterator[tuple[int, pa.Table]]:
        """Passes on what is to be scored."""
        for bucket, rows in buckets:
            lines = rows.select(["id", "messages"]).to_pylist()
            self.ids |= trimmed_ids(self._tokenizer, lines, self._template)
            yield bucket, rows

    def scored(self, scored: Any) -> Any:
        """Passes on what came of it; rows without a score were not trimmed but left out."""
        for bucket, (lines, reasons) in scored:
            self.ids -= set(reasons)
            yield bucket, (lines, reasons)


def trimmed_note(info: Mapping[str, Any]) -> str | None:
    """What a likelihood table's manifest says about responses that a template trims."""
    if not info.get("trimmed"):
        return None
    return (
        f"likelihood: the chat template takes white space off the ends of {info['trimmed']:,} of "
        f"{info['scored']:,} responses"
    )


def observed(scored: Any, observe: Observe) -> Any:
    """Passes buckets on and says how many rows of each were scored."""
    for bucket, (lines, reasons) in scored:
        observe(bucket, {"scored": lines.height, "failed": len(reasons)})
        yield bucket, (lines, reasons)


def target_name(context: Context) -> str:
    """Name of the model in the target role."""
    return context.recipe.roles["target"]


def likelihoods(context: Context) -> tuple[list[pl.DataFrame], dict[str, str]]:
    """Scores of the rows in play, one frame per bucket, and reasons of the failed by id.

    Rows of the pool come from the shared table; the others, or all where there is no table, go
    through the store.
    """
    spec, asked = context.spec("target"), context.recipe.likelihood
    folder = context.workspace.scores(context.recipe.pool.name, target_name(context), "likelihood")
    table = likelihood_table(folder, context.pool, spec, asked).reader()
    wanted = [context.in_play(bucket) for bucket in context.buckets]
    known = [
        table(bucket).filter(pl.col("id").is_in(wanted[bucket]))
        if table
        else pl.DataFrame(schema=COLUMNS)
        for bucket in context.buckets
    ]
    have = {i for frame in known for i in frame["id"].to_list()}
    missing = {i for ids in wanted for i in ids} - have
    if not missing:
        return known, {}
    fresh, failed = _score_missing(context, missing)
    return [
        pl.concat([frame, fresh.filter(pl.col("id").is_in(ids))]).sort("id")
        for frame, ids in zip(known, wanted, strict=True)
    ], failed


def _score_missing(context: Context, missing: set[str]) -> tuple[pl.DataFrame, dict[str, str]]:
    wanted = pa.array(sorted(missing), pa.string())

    def rows(bucket: int) -> pa.Table:
        found = context.rows(bucket)
        return found.filter(pa.compute.is_in(found["id"], wanted))

    return score_rows(context, rows, context.pool.buckets, len(missing))


def score_rows(
    context: Context, rows: Callable[[int], pa.Table], buckets: int, total: int
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Scores of the rows that `rows` reads by bucket, and reasons of the failed by id."""
    progress = Progress(context.stage.name, 2 * total, context.emit, "forward rows")
    recorders = context.recorders("target", progress)
    frames, failed = [pl.DataFrame(schema=COLUMNS)], {}
    asked, found = context.recipe.likelihood, by_store_bucket(rows, buckets)
    for _, (frame, reasons) in score_buckets(recorders, found, asked, progress.advance):
        frames.append(frame)
        failed.update(reasons)
    progress.close()
    return pl.concat(frames), failed
