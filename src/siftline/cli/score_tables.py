"""Likelihoods of rows in plain files, as two Parquet tables beside a store.

The files go through the same ingestion, spans and store as a recipe's pool, so the numbers are the
same ones. In between the rows lie in a pool of their own under a dot-name, which is what keeps them
off the memory; it goes once the tables are there. The store stays: the next run on the same rows
asks the model nothing, and a killed one is taken up where it was.

Gradient features of rows in plain files, for `siftline select less`.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from siftline.disk import check_folder, writing
from siftline.ingest.pool import PROVENANCE, QUARANTINE, Pool, PoolSpec, build_pool
from siftline.ingest.readers import Source, source_files
from siftline.locks import held
from siftline.progress import Tracker
from siftline.rows.published import LISTED, forget_outputs, record_outputs
from siftline.rows.shards import write_parquet
from siftline.scoring.engines.base import ModelSpec, check_directory
from siftline.scoring.measures.likelihood import Likelihood
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import trimmed_ids
from siftline.selectors.less import Gradients
from siftline.stages.context import by_store_bucket
from siftline.stages.models import engines, total
from siftline.stages.scores import score_buckets
from siftline.stages.select.gradients import differentiating, features, warm_share, warmed
from siftline.store.store import BUCKETS

MARK = ".siftline-score"
"""Says that a folder is ours, and is locked by the process that writes it."""
SCORES, FAILED, STORE, ROWS = "scores.parquet", "failed.parquet", "store", ".rows"
GRADIENTS, WARM_UP, TARGET = "gradients.parquet", "models", ".target"
"""What `--gradients` leaves: features, warm-ups, and the target's rows while they are needed."""
_COLUMNS = {
    "id": pa.string(),
    "file": pa.string(),
    "row": pa.int64(),
    "n_response_tokens": pa.int32(),
    "logprob_sum": pa.float64(),
    "logprob_mean": pa.float64(),
    "logprob_mean_unconditional": pa.float64(),
    "perplexity": pa.float64(),
    "ifd_loss_ratio": pa.float64(),
    "ifd_perplexity_ratio": pa.float64(),
}
_DETAILS = {"entropy": "entropy_mean", "top1": "top1_rate"}
_FAILED = pa.schema(
    [("id", pa.string()), ("file", pa.string()), ("row", pa.int64()), ("reason", pa.string())]
)
MakeTracker = Callable[[str, int, str], Tracker]


@dataclass(frozen=True)
class Scored:
    """What was scored.

    Attributes:
        scores: Table of scored rows, one line for every place a row was read from.
        failed: Table of the others, with reasons.
        computed: Forward rows (a row with its prompt, and without it) asked of the model now.
        found: Forward rows that were in the store.
        tokens: Tokens of the computed ones.
        seconds: Time it took, without reading the files and loading the model.
        reading: What reading the files met with; see `Pool.reading`.
        trimmed: Scored rows whose response lost white space around it to the chat template.
    """

    scores: pl.DataFrame
    failed: pl.DataFrame
    computed: int
    found: int
    tokens: int
    seconds: float
    reading: dict[str, Any]
    trimmed: int


def score_files(
    sources: Sequence[Source],
    spec: ModelSpec,
    asked: Likelihood,
    out: Path,
    make_tracker: MakeTracker,
) -> Scored:
    """Scores every row of some files and writes `scores.parquet` and `failed.parquet`.

    Args:
        sources: The files and how they are read.
        spec: The model.
        asked: Which turns, and what beside the log-probability.
        out: Folder of the tables and of their store.
        make_tracker: Takes label, total and unit of a step.

    Raises:
        ValueError: if a file or the model is not there, no row can be read, or `out` holds
            something else.
    """
    check_directory(spec)
    for source in sources:
        source_files(source)
    with claimed(out):
        pool = ingested(out / ROWS, sources, make_tracker)
        scored = _score(pool, spec, asked, out / STORE, make_tracker)
        write_failed(scored.failed, out)
        write_parquet(_with_vectors(scored.scores, asked), out / SCORES)
        shutil.rmtree(out / ROWS)
        record_outputs(out, [name for name in (SCORES, FAILED) if (out / name).exists()])
    return scored


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Holds the output folder.

    Raises:
        ValueError: if it holds what this command did not write, or another process holds it.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder")
    mine = (MARK, LISTED, SCORES, FAILED, STORE, ROWS, GRADIENTS, WARM_UP, TARGET)
    there = sorted(path.name for path in out.iterdir()) if out.exists() else []
    written = tuple(f".{name}." for name in (SCORES, FAILED, GRADIENTS))  # by a killed run
    other = [name for name in there if name not in mine and not name.startswith(written)]
    if other or (there and MARK not in there):
        raise ValueError(f"{out} holds {(other or there)[0]}, not from here: name an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    check_folder(out)
    with held(out / MARK, str(out), wait=False), writing(out):
        forget_outputs(out)
        for name in there:
            if name.startswith(written):
                (out / name).unlink()
        yield


def ingested(folder: Path, sources: Sequence[Source], make_tracker: MakeTracker) -> Pool:
    """The rows of all files, in as many buckets as the store has.

    Responses that are labelled bad are rows like others here: a pair is two rows with scores.
    """
    spec = PoolSpec("input", tuple(sources), buckets=BUCKETS, max_quarantine=1.0)
    tracker = make_tracker("read", 0, "rows")
    try:
        build_pool(folder, spec, tracker.advance, apart=False)
    finally:
        tracker.close()
    return Pool(folder)


def _score(
    pool: Pool, spec: ModelSpec, asked: Likelihood, store: Path, make_tracker: MakeTracker
) -> Scored:
    scores, failed = [], [unreadable(pool)]
    trims = 0
    total_rows = 2 * pool.manifest.rows("rows")

    with engines() as opened:
        recorders = opened.recorders(
            spec, store, lambda rows, tokens: tracker.advance(rows, tokens)
        )
        tracker = make_tracker("likelihood", total_rows, "forward rows")  # the model is loaded
        begun = time.monotonic()
        buckets = by_store_bucket(pool.rows, pool.buckets)
        try:
            for bucket, (lines, reasons) in score_buckets(
                recorders, buckets, asked, tracker.advance
            ):
                trims += _trimmed(recorders[0], pool.rows(bucket), reasons)
                found, lost = _by_place(pool, bucket, lines, reasons, asked)
                scores.append(found)
                failed.append(lost)
        finally:
            tracker.close()
        seconds = time.monotonic() - begun
        tally = total(recorders)
    result = Scored(
        pl.concat(scores).sort("file", "row", "id"),
        pl.concat(failed).sort("file", "row", "id"),
        computed=tally.computed,
        found=tally.found,
        tokens=tally.tokens,
        seconds=seconds,
        reading=pool.reading(),
        trimmed=trims,
    )
    read = pool.manifest.rows(PROVENANCE) + pool.manifest.rows(QUARANTINE)
    assert result.scores.height + result.failed.height == read, "a row is unaccounted for"
    return result


def _trimmed(recorder: Recorder, rows: pa.Table, reasons: dict[str, str]) -> int:
    """Scored rows whose response the chat template trims."""
    lines = rows.select(["id", "messages"]).to_pylist()
    return len(trimmed_ids(recorder.engine.tokenizer, lines, recorder.spec.template) - set(reasons))


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def unreadable(pool: Pool) -> pl.DataFrame:
    """Input rows that became none."""
    lines = _frame(pool.read(QUARANTINE, 0, ["file", "line", "reason"]))
    return lines.select(
        pl.lit(None, pl.String).alias("id"), "file", pl.col("line").alias("row"), "reason"
    )


def places_of(pool: Pool, bucket: int) -> pl.DataFrame:
    """Id, file and row (from 1) of every place that rows of a bucket were read from."""
    return _frame(pool.read(PROVENANCE, bucket, ["id", "file", "line"])).rename({"line": "row"})


def _by_place(
    pool: Pool, bucket: int, lines: pl.DataFrame, reasons: dict[str, str], asked: Likelihood
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Scores and failures of a bucket, once for every place a row was read from."""
    places = places_of(pool, bucket)
    lost = lost_places(places, reasons)
    more = [_DETAILS[detail] for detail in asked.details if detail in _DETAILS]
    more += ["pooled"] if "pooled" in asked.details else []
    found = places.join(lines.rename({"n_tokens": "n_response_tokens"}), on="id")
    return found.select(*_COLUMNS, *more), lost


def lost_places(places: pl.DataFrame, reasons: dict[str, str]) -> pl.DataFrame:
    """Lines of the table of failures for rows by id: one for every place each was read from."""
    lost = pl.DataFrame(
        {"id": list(reasons), "reason": list(reasons.values())},
        schema={"id": pl.String, "reason": pl.String},
    )
    return places.join(lost, on="id").select(_FAILED.names)


def write_failed(failed: pl.DataFrame, out: Path) -> None:
    """Writes the table of failures."""
    write_parquet(failed.to_arrow().cast(_FAILED), out / FAILED)


def _with_vectors(scores: pl.DataFrame, asked: Likelihood) -> pa.Table:
    """The table as written; pooled states as lists of float32, which every reader knows."""
    plain = [pa.field(name, kind) for name, kind in _COLUMNS.items()]
    more = [pa.field(n, pa.float64()) for d, n in _DETAILS.items() if d in asked.details]
    schema = pa.schema([*plain, *more])
    table = scores.select(schema.names).to_arrow().cast(schema)
    if "pooled" not in asked.details:
        return table
    raw = scores["pooled"].to_list()
    width = len(raw[0]) // 2 if raw else 0
    flat = np.frombuffer(b"".join(raw), "<f2").astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
    return table.append_column("pooled", vectors)


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
