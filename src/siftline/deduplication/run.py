"""Deduplicates files: reads them twice, decides, and writes what is kept and what is not.

The first reading leaves a key a band of each row, the second the shingles of those rows only that
share a key, the third copies rows to the output. So memory holds a few numbers a row, and never the
texts. The output folder is built under a dot-name and appears whole.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from siftline.deduplication.arrow import texts_of
from siftline.deduplication.engine import (
    Clock,
    Deduplicated,
    Engine,
    Settings,
    gathered,
    ranks,
    spread,
)
from siftline.deduplication.files import Reader, Table, ahead, open_tables, read_pieces
from siftline.deduplication.index import opened
from siftline.deduplication.output import (
    MakeTracker,
    claim,
    first_rows,
    parts_of,
    row_names,
    summary,
    write_out,
)
from siftline.disk import need
from siftline.kernels.sets.keepers import Keep
from siftline.kernels.sets.spill import Keys, values_room
from siftline.kernels.text.texts import Texts
from siftline.progress import Tracker
from siftline.rows.shards import building, write_parquet

TEXTS_IN_MEMORY = 1 << 30
"""Bytes of text above which files are read a second time rather than held."""
CHANGED, SCRATCH = "changes.parquet", ".scratch"
Read = Callable[[Table, Sequence[str] | None], Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        files: Files of any format that recipes read; their order is row order.
        out: Folder that the result is written to.
        text_column: Column that is compared.
        settings: How texts are compared.
        keep: Which copy stays.
        index: Folder of earlier rows, which these are compared with and added to.
        target: Most rows to keep: the threshold is the highest, in steps of 0.01 from 1 down to
            that of the settings, that keeps no more.
        rehydrate: Say how often to repeat each kept row.
        embeddings: Column of vectors, or a .npy file of one a row: compare these by cosine
            similarity, not the texts.
        nearest: How: `exact`, or in cells by `faiss`; a target searches again for every step.
    """

    files: tuple[str, ...]
    out: Path
    text_column: str = "text"
    settings: Settings = field(default_factory=Settings)
    keep: Keep = field(default_factory=Keep)
    index: Path | None = None
    target: int | None = None
    rehydrate: bool = False
    embeddings: str | None = None
    nearest: Literal["exact", "faiss"] = "exact"

    def __post_init__(self) -> None:
        if self.index is not None and (self.target is not None or self.embeddings is not None):
            raise ValueError("an index takes neither a target nor embeddings: leave one out")
        if self.nearest != "exact" and self.embeddings is None:
            raise ValueError(
                f"nearest={self.nearest} searches embeddings: give them or leave it out"
            )
        index = None if self.index is None else self.index.absolute()
        out = self.out.absolute()
        if index is not None and (out == index or out in index.parents or index in out.parents):
            raise ValueError(f"--index {index} and --out {out} must be apart: name two folders")
        if self.target is not None and self.target < 1:
            raise ValueError(f"target={self.target} must be at least 1")

    @property
    def columns(self) -> list[str]:
        """Columns that are read to decide."""
        vectors = self.embeddings
        stored = vectors is None or vectors.endswith(".npy")
        names = [self.text_column, self.keep.column, None if stored else vectors]
        return list(dict.fromkeys(name for name in names if name))


def dedup_files(job: Job, make_tracker: MakeTracker) -> dict[str, Any]:
    """Does a job; returns its counts and the seconds of its phases.

    Args:
        job: What to do.
        make_tracker: Takes label, total and unit of a step.

    Raises:
        ValueError: if a file can't be read or lacks a column, the output folder is not empty, or
            too many rows resemble each other.
    """
    claim(job.out)
    given = sum(Path(name).stat().st_size for name in job.files if Path(name).is_file())
    need(job.out, given // 4, "the output")  # kept and removed rows, packed at their best
    clock = Clock()
    with building(job.out) as folder, Engine(job.settings) as engine:
        scratch = folder / SCRATCH
        with clock.phase("open"):
            tables = open_tables(job.files, job.columns, scratch)
        if job.index is not None:
            facts = _with_index(job, job.index, tables, engine, folder, clock, make_tracker)
        else:
            read = Reader(tables)
            if job.embeddings is not None:
                result, threshold = by_meaning(job, tables, clock)
            else:
                result, threshold = _decide(job, tables, read, engine, scratch, clock, make_tracker)
            facts = {**summary(result), "threshold": threshold}
            with clock.phase("write"):
                starts = first_rows(tables)
                named = row_names(tables, starts)
                parts = parts_of(result, threshold, named, job.rehydrate)
                write_out(folder, tables, starts, parts, make_tracker, read)
        rmtree(scratch, ignore_errors=True)
    seconds = {name: round(value, 4) for name, value in clock.seconds.items()}
    repeated = sum(table.repeated for table in tables)
    return {"out": str(job.out), **facts, "repeated_keys": repeated, "seconds": seconds}


def read_all(
    job: Job, tables: Sequence[Table], tracker: Tracker, read: Read = read_pieces
) -> Iterator[tuple[Texts, int, np.ndarray]]:
    """Texts of all tables piece by piece, the number of the first row, and priorities."""
    at = 0
    for table in tables:
        for batch in ahead(read(table, job.columns)):
            text = batch.column(job.text_column)
            try:
                texts = texts_of(text)
                extra = batch.column(job.keep.column) if job.keep.column else None
                priority = job.keep.priority(_plain(text), extra)
            except ValueError as error:
                raise ValueError(f"{table.name}: {error}") from error
            yield texts, at, priority
            at += batch.num_rows
            tracker.advance(batch.num_rows)


def _with_index(
    job: Job,
    place: Path,
    tables: Sequence[Table],
    engine: Engine,
    folder: Path,
    clock: Clock,
    make_tracker: MakeTracker,
) -> dict[str, Any]:
    """Adds what is new to the index, then writes out; a second try finds the files in it.

    Raises:
        ValueError: if a file does not lie on this machine, where the index looks for it again.
    """
    away = next((table.name for table in tables if not Path(table.name).is_file()), None)
    if away is not None:
        raise ValueError(f"{away}: an index takes files on this machine: fetch it first")
    with opened(place, job.settings, job.keep, job.text_column) as index:
        with clock.phase("add"):
            new = index.unknown(tables)
            before = index.rows
            tracker = make_tracker("add", sum(table.rows for table in new), "rows")
            result = index.add(new, read_all(job, new, tracker), engine)
            tracker.close()
        changes = index.changed(tables)
        with clock.phase("write"):
            starts = index.firsts(tables)
            parts = parts_of(result, job.settings.threshold, index.named, job.rehydrate)
            write_out(folder, tables, starts, parts, make_tracker)
            write_parquet(changes, folder / CHANGED)
        spans = zip(starts, tables, strict=True)
        rows = np.concatenate([np.arange(first, first + table.rows) for first, table in spans])
        kinds = changes.column("sift_change").to_pylist()
        return {
            **summary(result, rows),
            "rows_before": before,
            "retracted": kinds.count("retracted"),
            "restored": kinds.count("restored"),
        }


def _decide(
    job: Job,
    tables: Sequence[Table],
    read: Read,
    engine: Engine,
    scratch: Path,
    clock: Clock,
    make_tracker: MakeTracker,
) -> tuple[Deduplicated, float]:
    n = sum(table.rows for table in tables)
    keys = Keys(n, engine.banding.bands, scratch)
    priority = np.empty(n, np.float64) if job.keep.ordered else None
    held: list[tuple[Texts, int]] = []
    size = 0
    with clock.phase("read"):
        tracker = make_tracker("read", n, "rows")
        for texts, at, mine in read_all(job, tables, tracker, read):
            rows = len(texts.null)
            size += texts.data.nbytes
            held = [*held, (texts, at)] if size <= TEXTS_IN_MEMORY else []
            engine.summarise(texts, *keys.room(rows))
            keys.take(rows)
            if priority is not None:
                priority[at : at + rows] = mine
        keys.finish()
        tracker.close()
    with clock.phase("group"):
        groups = engine.group(keys.band, n, ranks(priority))
    with clock.phase("collect"):
        tracker = make_tracker("collect", n, "rows")
        again = ((texts, at) for texts, at, _ in read_all(job, tables, tracker, read))
        parts = iter(held) if size <= TEXTS_IN_MEMORY or not len(groups.rows) else again
        room = lambda size: values_room(size, scratch)  # noqa: E731
        sets = gathered(engine, groups.rows, keys.counts, parts, room)
        tracker.close()
    with clock.phase("decide"):
        drop = job.keep.policy == "none"

        def decide(threshold: float) -> Deduplicated:
            hashes = keys.hashes[groups.rows]
            decided, pairs = engine.decide(groups, hashes, sets, drop, threshold=threshold)
            return spread(n, groups.rows, decided, keys.hashes, pairs, clock.seconds)

        return at_target(job, decide)


def at_target(job: Job, decide: Callable[[float], Deduplicated]) -> tuple[Deduplicated, float]:
    """Decides at the threshold of the settings, or at the highest that keeps the target.

    Args:
        job: What is asked.
        decide: Takes a threshold.

    Returns:
        The decisions, with the pairs of all tries, and their threshold.

    Raises:
        ValueError: if the threshold of the settings keeps more than the target.
    """
    threshold = 1.0 if job.target is not None else job.settings.threshold
    pairs = 0
    while True:
        result = decide(threshold)
        pairs += result.pairs
        kept = int(result.kept.sum())
        if job.target is None or kept <= job.target:
            return replace(result, pairs=pairs), threshold
        if threshold <= job.settings.threshold:
            raise ValueError(
                f"at threshold {threshold} still {kept:,} rows are kept, more than the target "
                f"{job.target:,}: lower the threshold"
            )
        threshold = max(round(threshold - 0.01, 6), job.settings.threshold)


def by_meaning(job: Job, tables: Sequence[Table], clock: Clock) -> tuple[Deduplicated, float]:
    """Compares the embeddings of some tables; the decisions and their threshold, as `at_target`.

    Raises:
        ValueError: if they are not there, or do not fit the rows.
    """
    from siftline.deduplication.semantic import check_rows, semantic_duplicates, vectors_of

    asked = job.embeddings
    assert asked is not None
    n = sum(table.rows for table in tables)
    check_rows(n, job.nearest)
    with clock.phase("read"):
        priority: list[np.ndarray] = []
        vectors: list[np.ndarray] = []
        for table in tables:
            for batch in read_pieces(table, job.columns):
                extra = batch.column(job.keep.column) if job.keep.column else None
                text = batch.column(job.text_column)
                priority.append(job.keep.priority(_plain(text), extra))
                if not asked.endswith(".npy"):
                    vectors.append(vectors_of(pa.chunked_array([batch.column(asked)])))
        if asked.endswith(".npy"):
            vectors = [_stored(Path(asked))]
    if len({part.shape[1:] for part in vectors if len(part)}) > 1:
        raise ValueError(f"embeddings in {asked} must be of one width")
    parts = [part for part in vectors if len(part)] or [np.zeros((0, 1), np.float32)]
    x = parts[0] if len(parts) == 1 else np.concatenate(parts)  # a file's stays on disk
    if len(x) != n:
        raise ValueError(f"{asked} holds {len(x):,} vectors for {n:,} rows: give one a row")
    order = np.concatenate(priority) if priority and job.keep.ordered else None
    with clock.phase("search"):
        drop = job.keep.policy == "none"

        def decide(threshold: float) -> Deduplicated:
            return semantic_duplicates(
                x, threshold, priority=order, drop_all=drop, nearest=job.nearest
            )

        return at_target(job, decide)


def _stored(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable .npy file ({error}): write it again") from error


def _plain(text: pa.Array) -> pa.Array:
    return text.dictionary_decode() if pa.types.is_dictionary(text.type) else text
