"""Likelihood: the shared score table of a pool, and the outlier gate that reads it.

The table covers the whole pool once and is shared by recipes. Rows that a stage adds later are
scored through the same store when a gate asks for them.
"""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.ledger import StageResult
from siftline.progress import Progress
from siftline.scoring.engines import ModelSpec
from siftline.scoring.likelihood import COLUMNS, score_likelihood
from siftline.selectors.outliers import LikelihoodOutliers
from siftline.shards import Manifest, PartWriter, RowHash, read_bucket
from siftline.stages.context import Context, StageRun, by_store_bucket, pass_earlier, split_failed
from siftline.stages.models import Engines, identity

TABLE = pa.schema(
    [
        ("id", pa.string()),
        ("key", pa.string()),
        ("n_tokens", pa.int32()),
        ("logprob_sum", pa.float64()),
        ("logprob_mean", pa.float64()),
        ("logprob_mean_unconditional", pa.float64()),
        ("perplexity", pa.float64()),
        ("ifd_loss_ratio", pa.float64()),
        ("ifd_perplexity_ratio", pa.float64()),
        ("entropy_mean", pa.float64()),
        ("top1_rate", pa.float64()),
        ("pooled", pa.binary()),
    ]
)
FAILED = pa.schema([("id", pa.string()), ("reason", pa.string())])


def score_pool(
    folder: Path,
    pool: Pool,
    spec: ModelSpec,
    store: Path,
    opened: Engines,
    emit: Callable[[str], None],
) -> tuple[Manifest, bool]:
    """Scores every row of a pool that the store doesn't know, and writes the score table.

    Args:
        folder: Folder of the table.
        pool: The pool.
        spec: The target model.
        store: Folder of the store.
        opened: Engines of this process.
        emit: Takes lines of progress.

    Returns:
        The table's manifest, and whether it was written now. A table with failed rows is made
        again, which asks the model for those rows alone.
    """
    inputs = {"pool": pool.version, "model": identity(spec), "buckets": pool.buckets}
    path = folder / "manifest.json"
    if path.exists():
        found = Manifest.load(path)
        whole = not found.info["failed"] and not found.missing(folder)
        if found.info["inputs"] == inputs and whole:
            return found, False
    progress = Progress("likelihood", 2 * pool.manifest.rows("rows"), emit, "forward rows")
    recorder = opened.recorder(spec, store, progress.advance)
    lines, reasons = [], {}
    for bucket, rows in by_store_bucket(pool.rows, pool.buckets):
        frame, failed = score_likelihood(recorder, bucket, rows)
        lines.append(frame)
        reasons.update(failed)
    progress.close()
    return _write(folder, pool, pl.concat(lines), reasons, inputs, vars(recorder.tally)), True


def _write(
    folder: Path,
    pool: Pool,
    scores: pl.DataFrame,
    failed: dict[str, str],
    inputs: dict[str, object],
    tally: dict[str, int],
) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    writer, version = PartWriter(folder), RowHash()
    for bucket in range(pool.buckets):
        ids = pool.rows(bucket, ["id"]).column("id").to_pylist()
        part = scores.filter(pl.col("id").is_in(ids)).sort("id").to_arrow().cast(TABLE)
        version.update(part)
        writer.add("scores", bucket, part)
    lost = pl.DataFrame(
        {"id": list(failed), "reason": list(failed.values())},
        schema_overrides={"id": pl.String, "reason": pl.String},
    ).sort("id")
    writer.add("failed", 0, lost.to_arrow().cast(FAILED))
    info = {"inputs": inputs, "scored": scores.height, "failed": lost.height, **tally}
    manifest = Manifest(version.hexdigest(), pool.buckets, tuple(writer.parts), info)
    manifest.save(folder / "manifest.json")
    return manifest


def score_table(
    folder: Path, pool: Pool, spec: ModelSpec
) -> "Callable[[int], pl.DataFrame] | None":
    """Reads the score table by bucket; None where there is none for this pool and model."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    manifest = Manifest.load(path)
    wanted = {"pool": pool.version, "model": identity(spec), "buckets": pool.buckets}
    if manifest.info["inputs"] != wanted:
        return None

    def read(bucket: int) -> pl.DataFrame:
        frame = pl.from_arrow(read_bucket(folder, manifest, "scores", bucket, schema=TABLE))
        assert isinstance(frame, pl.DataFrame)
        return frame

    return read


def target_name(context: Context) -> str:
    """Name of the model in the target role."""
    return context.recipe.roles["target"]


def likelihoods(context: Context) -> tuple[list[pl.DataFrame], dict[str, str]]:
    """Scores of the rows in play, one frame per bucket, and reasons of the failed by id.

    Rows of the pool come from the shared table; the others, or all where there is no table, go
    through the store.
    """
    spec = context.spec("target")
    folder = context.workspace.scores(context.recipe.pool.name, target_name(context), "likelihood")
    table = score_table(folder, context.pool, spec)
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
    fresh, failed = _score_missing(context, spec, missing)
    return [
        pl.concat([frame, fresh.filter(pl.col("id").is_in(ids))]).sort("id")
        for frame, ids in zip(known, wanted, strict=True)
    ], failed


def _score_missing(
    context: Context, spec: ModelSpec, missing: set[str]
) -> tuple[pl.DataFrame, dict[str, str]]:
    progress = Progress(context.stage.name, 2 * len(missing), context.emit, "forward rows")
    recorder = context.opened.recorder(spec, context.workspace.store, progress.advance)
    frames, failed = [pl.DataFrame(schema=COLUMNS)], {}
    for bucket, rows in context.store_buckets():
        asked = rows.filter(pa.compute.is_in(rows["id"], pa.array(sorted(missing), pa.string())))
        if asked.num_rows:
            frame, reasons = score_likelihood(recorder, bucket, asked)
            frames.append(frame)
            failed.update(reasons)
    progress.close()
    return pl.concat(frames), failed


def likelihood_gate(context: Context) -> StageRun:
    """Drops likelihood outliers within source and length; rows without a score fail."""
    options = context.stage.options
    assert isinstance(options, LikelihoodOutliers)
    scored, failed = likelihoods(context)
    frames = []
    for bucket, frame in zip(context.buckets, scored, strict=True):
        rows = context.rows(bucket).select(["id", "source"])
        sources = pl.from_arrow(rows)
        assert isinstance(sources, pl.DataFrame)
        frames.append(frame.join(sources.with_columns(pl.col("source").fill_null("")), on="id"))
    plan = options.decide([options.summarise(frame) for frame in frames])
    results: list[StageResult] = []
    table = []
    for bucket, frame in zip(context.buckets, frames, strict=True):
        selection = options.apply(frame, plan)
        here = set(context.in_play(bucket)) - set(frame["id"].to_list())
        decided = pass_earlier(selection, context.judged(bucket))
        results.append(split_failed(decided, {i: failed[i] for i in sorted(here)}))
        table.append(frame.select("id", "n_tokens", "logprob_mean", "perplexity"))
    facts = {**plan.facts, "vacuous": plan.vacuous}
    return StageRun(results, {"likelihood": pl.concat(table).sort("id")}, facts)
