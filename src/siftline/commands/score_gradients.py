"""Gradient features of rows in plain files, for `siftline select less`.

The same ingestion, warm-up, store and features as in a recipe. Rows of the files count by their
Adam update and rows of the target by their gradient, so a row has to be one or the other.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from siftline.commands.score_tables import (
    FAILED,
    GRADIENTS,
    ROWS,
    STORE,
    TARGET,
    WARM_UP,
    claimed,
    ingested,
    lost_places,
    places_of,
    unreadable,
    write_failed,
)
from siftline.ingest.pool import Pool
from siftline.ingest.readers import Source, source_files
from siftline.progress import Tracker
from siftline.rows.outputs import record_outputs
from siftline.scoring.engines.base import ModelSpec, check_directory
from siftline.selectors.less import Gradients
from siftline.stages.context import by_store_bucket
from siftline.stages.parallel import total
from siftline.stages.select.gradients import differentiating, features, warm_share, warmed

MakeTracker = Callable[[str, int, str], Tracker]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Differentiated:
    """What was made.

    Attributes:
        rows: Rows of the files with features.
        target_rows: Rows of the target with features.
        failed: Table of the places whose rows have none.
        warmup_rows: Rows the adapter was warmed up on.
        checkpoints: Optimizer steps at each checkpoint.
        width: Values of a row: dimensions times checkpoints.
        computed: Gradients computed now.
        found: Gradients that were in the store.
        tokens: Tokens of the computed ones.
        seconds: Time it took, the warm-up and loading included.
    """

    rows: int
    target_rows: int
    failed: pl.DataFrame
    warmup_rows: int
    checkpoints: list[int]
    width: int
    computed: int
    found: int
    tokens: int
    seconds: float


def gradient_files(
    sources: Sequence[Source],
    targets: Sequence[Source],
    spec: ModelSpec,
    asked: Gradients,
    seed: int,
    out: Path,
    make_tracker: MakeTracker,
    say: Say,
) -> Differentiated:
    """Makes the features of all rows and writes `gradients.parquet` and `failed.parquet`.

    Args:
        sources: The files and how they are read.
        targets: Files of the target.
        spec: The model.
        asked: How features are made.
        seed: Of the warm-up and of the projection.
        out: Folder of the tables, their store and the warm-ups.
        make_tracker: Takes label, total and unit of a step.
        say: Takes lines of progress.

    Raises:
        ValueError: if a file or the model is not there, a row is in both, or `out` holds something
            else.
    """
    check_directory(spec)
    for source in (*sources, *targets):
        source_files(source)
    with claimed(out):
        shutil.rmtree(out / TARGET, ignore_errors=True)
        pool = ingested(out / ROWS, sources, make_tracker)
        target = ingested(out / TARGET, targets, make_tracker)
        _check_apart(pool, target)
        made = _made(pool, target, spec, asked, seed, out, make_tracker, say)
        write_failed(made.failed, out)
        for name in (ROWS, TARGET):
            shutil.rmtree(out / name)
        record_outputs(out, [name for name in (GRADIENTS, FAILED) if (out / name).exists()])
    return made


def _ids(pool: Pool) -> list[str]:
    return [i for b in range(pool.buckets) for i in pool.rows(b, ["id"])["id"].to_pylist()]


def _check_apart(pool: Pool, target: Pool) -> None:
    twice = sorted(set(_ids(pool)) & set(_ids(target)))
    if twice:
        raise ValueError(
            f"{len(twice)} rows are in FILE and in --target, first {twice[0]}: take them out of one"
        )


def _made(
    pool: Pool,
    target: Pool,
    spec: ModelSpec,
    asked: Gradients,
    seed: int,
    out: Path,
    make_tracker: MakeTracker,
    say: Say,
) -> Differentiated:
    begun = time.monotonic()
    share = pa.array(sorted(warm_share(_ids(pool), asked.share, seed)), pa.string())
    parts = (pool.rows(bucket) for bucket in range(pool.buckets))
    rows = pa.concat_tables(part.filter(pa.compute.is_in(part["id"], share)) for part in parts)
    snapshots = warmed(spec, rows, out / WARM_UP, asked, seed, say)
    count = (pool.manifest.rows("rows") + target.manifest.rows("rows")) * len(snapshots)
    tracker = make_tracker("gradients", count, "gradients")
    width = asked.dimensions * len(snapshots)
    failed = [unreadable(pool), unreadable(target)]
    written = []
    try:
        with (
            differentiating(spec, snapshots, asked, seed, out / STORE, tracker.advance) as seats,
            _writing(out / GRADIENTS, width) as write,
        ):
            for each in (target, pool):  # the few first: what is wrong with them shows at once
                done = 0
                buckets = by_store_bucket(each.rows, each.buckets)
                for bucket, (found, reasons) in features(seats, buckets, target=each is target):
                    write(found)
                    done += len(found)
                    failed.append(lost_places(places_of(each, bucket), reasons))
                written.append(done)
            tally = total([recorder for seat in seats for recorder in seat])
    finally:
        tracker.close()
    return Differentiated(
        rows=written[1],
        target_rows=written[0],
        failed=pl.concat(failed).sort("file", "row", "id"),
        warmup_rows=rows.num_rows,
        checkpoints=[s.step for s in snapshots if s is not None],
        width=width,
        computed=tally.computed,
        found=tally.found,
        tokens=tally.tokens,
        seconds=time.monotonic() - begun,
    )


class _writing:
    """Writes features bucket by bucket into a file that appears when all are there."""

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.draft = path, path.with_name(f".{path.name}.draft")
        self.width = width
        self.schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float16(), width))])

    def __enter__(self) -> Callable[[dict[str, np.ndarray]], None]:
        self.writer = pq.ParquetWriter(self.draft, self.schema, compression="zstd")
        return self._write

    def _write(self, found: dict[str, np.ndarray]) -> None:
        if not found:
            return
        values = pa.array(np.concatenate(list(found.values())), pa.float16())
        column = pa.FixedSizeListArray.from_arrays(values, self.width)
        self.writer.write_table(pa.table([pa.array(list(found)), column], schema=self.schema))

    def __exit__(self, kind: object, *_: object) -> None:
        self.writer.close()
        if kind is None:
            self.draft.replace(self.path)
        else:
            self.draft.unlink()
