"""Likelihood: the shared score table of a pool, and what stages read of it.

The table covers the whole pool once and is shared by recipes. Rows that a stage adds later are
scored through the same store when a gate asks for them.

Shared score tables: one line per row of a pool, in the pool's buckets.

Scores many store buckets, each response without its prompt asked once in all of them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.disk import scratch_folder
from siftline.ingest.pool import Pool
from siftline.progress import Progress
from siftline.rows.schema import bucket_of
from siftline.rows.shards import Manifest, PartWriter, RowHash, no_rows, read_bucket
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.measures import likelihood
from siftline.scoring.measures.likelihood import (
    ALONE,
    COLUMNS,
    Likelihood,
    Question,
    Reasons,
    alone_bucket,
    joined,
    score_alone,
    score_given,
)
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import trimmed_ids
from siftline.stages.context import Context, by_store_bucket
from siftline.stages.models import Engines, counted, identity, over_buckets, total
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


_WAITING = pa.schema(
    [
        ("row_bucket", pa.int32()),
        ("key", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("start", pa.int32()),
        ("end", pa.int32()),
    ]
)


def score_buckets(
    recorders: Sequence[Recorder],
    buckets: Iterable[tuple[int, pa.Table]],
    asked: Likelihood,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, tuple[pl.DataFrame, Reasons]]]:
    """Scores rows as `likelihood.score_likelihood` does, over many store buckets.

    Args:
        recorders: One for each device, on copies of one model.
        buckets: Store bucket and its rows, each bucket once.
        asked: Which turns, and what beside the log-probability.
        advance: Takes what no recorder reports: rows count twice, asked or not.

    Yields:
        Bucket, its lines and the reasons of its other rows, in the order of the buckets.
    """
    with scratch_folder(recorders[0].root, "responses") as folder:
        failed: dict[int, Reasons] = {}
        with _Waiting(folder) as waiting:
            for bucket, (given, reasons, left) in over_buckets(
                recorders, buckets, lambda r, b, rows: _with_prompts(r, b, rows, asked, advance)
            ):
                given.write_ipc(folder / f"given-{bucket}.arrow")
                failed[bucket] = reasons
                waiting.add(bucket, left)
        lacking: Reasons = {}
        for home, (answers, reasons) in over_buckets(
            recorders, waiting.read(), lambda r, b, table: _responses(r, b, table, advance)
        ):
            lacking |= reasons
            for (bucket,), part in answers.partition_by("row_bucket", as_dict=True).items():
                part.select(*ALONE).write_ipc(folder / f"alone-{bucket}-{home}.arrow")
        for bucket, reasons in failed.items():
            found = sorted(folder.glob(f"alone-{bucket}-*.arrow"))
            alone = [pl.DataFrame(schema=ALONE), *map(pl.read_ipc, found)]
            given = pl.read_ipc(folder / f"given-{bucket}.arrow")
            lines, lost = joined(given, pl.concat(alone), lacking)
            yield bucket, (lines, reasons | lost)


def _with_prompts(
    recorder: Recorder,
    bucket: int,
    rows: pa.Table,
    asked: Likelihood,
    advance: Callable[[int], None],
) -> tuple[pl.DataFrame, Reasons, dict[str, Question]]:
    reported: list[int] = []
    with counted([recorder], 0, reported.append):
        found = score_given(recorder, bucket, rows, asked)
    advance(2 * rows.num_rows - len(found[2]) + sum(reported))  # the rest is of the second round
    return found


def _responses(
    recorder: Recorder, bucket: int, table: pa.Table, advance: Callable[[int], None]
) -> tuple[pl.DataFrame, Reasons]:
    """Columns of `ALONE` and `row_bucket`, a line for each bucket that has the response."""
    questions: dict[str, Question] = {}
    for line in table.to_pylist():
        questions[line["key"]] = (line["tokens"], (line["start"], line["end"]))
    with counted([recorder], table.num_rows, advance):
        answers, reasons = score_alone(recorder, bucket, questions)
    homes = pl.from_arrow(table.select(["row_bucket", "key"]))
    assert isinstance(homes, pl.DataFrame)
    return homes.join(answers, on="key", maintain_order="left"), reasons


class _Waiting:
    """Responses that wait for the second round, in one file for each of their buckets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        self._opened = ExitStack()

    def __enter__(self) -> "_Waiting":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def add(self, row_bucket: int, alone: dict[str, Question]) -> None:
        """Writes the responses of one bucket of rows."""
        by_home: dict[int, list[tuple[int, str, list[int], int, int]]] = {}
        for key, (tokens, (start, end)) in sorted(alone.items()):
            line = (row_bucket, key, tokens, start, end)
            by_home.setdefault(alone_bucket(key), []).append(line)
        for home, lines in by_home.items():
            if home not in self._writers:
                sink = self._opened.enter_context(pa.OSFile(str(self._path(home)), "wb"))
                writer = pa.ipc.new_stream(sink, _WAITING)
                self._writers[home] = self._opened.enter_context(writer)
            columns = [list(column) for column in zip(*lines, strict=True)]
            self._writers[home].write_table(pa.table(columns, schema=_WAITING))

    def read(self) -> Iterator[tuple[int, pa.Table]]:
        """Bucket and responses, in order."""
        for home in sorted(self._writers):
            with pa.OSFile(str(self._path(home)), "rb") as source:
                yield home, pa.ipc.open_stream(source).read_all()

    def _path(self, home: int) -> Path:
        return self.folder / f"waiting-{home}.arrow"


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
