"""What a model tells of a recipe's rows after a warm-up: gradient features, or likelihoods.

Gradient features are of the rows in play and of the target sets, the warm-up is on a share of the
pool. Likelihoods are of the rows in play, the warm-up is on the target sets alone.

The warm-up lies among the models, named by the model, its rows and its options, so recipes share it
and a killed one goes on. Features are recorded under its content. More rows in play may move the
warm-up's share, and then every feature is a new one: a gradient is of one model only.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.kernels.draws import gumbel_top_k, uniforms
from siftline.progress import Progress
from siftline.rows.verified import content_hash
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.measures.likelihood import score_likelihood
from siftline.scoring.recorder import Recorder
from siftline.selectors.less import Gradients
from siftline.stages.context import Context, by_store_bucket
from siftline.stages.models import identity, on_devices, over_buckets, total
from siftline.stages.select.options import Select

Emit = Callable[[str], None]
Facts = dict[str, Any]
Found = tuple[dict[str, np.ndarray], dict[str, str]]


@dataclass(frozen=True)
class Featured:
    """Features of rows in play and of target rows, and what making them took.

    Attributes:
        pool: float16 vectors by id.
        target: float16 vectors by id.
        failed: Reasons by id of rows in play without one.
        facts: For the stage's facts.
    """

    pool: dict[str, np.ndarray]
    target: dict[str, np.ndarray]
    failed: dict[str, str]
    facts: dict[str, Any]


def warm_share(ids: Iterable[str], share: float, seed: int) -> set[str]:
    """The ids of a warm-up: `share` of them, rounded up, those with the largest draws."""
    names = sorted(ids)
    size = math.ceil(round(share * len(names), 9))  # 0.07 of 100 is 7.000000000000001
    u = uniforms(seed, "less warm-up", names)
    return {names[i] for i in gumbel_top_k(u, names, size)}


def warmed(
    spec: ModelSpec, rows: pa.Table, models: Path, asked: Gradients, seed: int, emit: Emit
) -> list[Any]:
    """Snapshots of the warm-up on some rows, made or found below the folder `models`.

    Args:
        spec: The model.
        rows: Columns id, messages, tools; none for no warm-up.
        models: Where its folder, named by what it is made of, lies.
        asked: How it is made.
        seed: Of its order and first weights.
        emit: Takes lines of progress.

    Raises:
        ValueError: if the model has no gradients that features could be made of.
    """
    from siftline.training.gradients import check_model
    from siftline.training.warmup import warm_up

    check_model(spec)
    if not rows.num_rows:
        return [None]
    decisive = {k: v for k, v in asdict(asked).items() if k not in ("dimensions", "share")}
    key = content_hash([identity(spec), sorted(rows["id"].to_pylist()), decisive, seed])
    progress = Progress("warm-up", 0, emit, "steps")
    found = warm_up(spec, rows, models / f"warmup-{key[:12]}", asked, seed, progress.reach)
    progress.close()
    return list(found)


@contextmanager
def differentiating(
    spec: ModelSpec,
    snapshots: list[Any],
    asked: Gradients,
    seed: int,
    store: Path,
    progress: Callable[[int, int], None],
) -> Iterator[list[list[Recorder]]]:
    """Recorders of every snapshot, once for each device of the specification; freed at the end."""
    from siftline.training.gradients import GradientEngine, GradientModel

    models = []
    try:
        workers = []
        for one in on_devices(spec):
            models.append(GradientModel(one, asked, seed))
            engines = [GradientEngine(models[-1], snapshot) for snapshot in snapshots]
            workers.append([Recorder(engine, one, store, progress) for engine in engines])
        yield workers
    finally:
        for model in models:
            model.close()


def features(
    workers: list[list[Recorder]], buckets: Iterable[tuple[int, pa.Table]], *, target: bool
) -> Iterator[tuple[int, Found]]:
    """Features by id and reasons by id of each store bucket."""
    from siftline.training.gradients import gradient_features

    def work(recorders: list[Recorder], bucket: int, rows: pa.Table) -> Found:
        return gradient_features(recorders, bucket, rows, target)

    yield from over_buckets(workers, buckets, work)


def featured(context: Context) -> Featured:
    """Features of the rows in play and of all target sets.

    Raises:
        ValueError: if a target row has none, or the recipe has no target set.
    """
    options, spec = context.stage.options, context.spec("target")
    assert isinstance(options, Select)
    asked = options.gradients or Gradients()
    if not context.recipe.sets.target:
        raise ValueError(
            f"{context.stage.name}: {options.method} selects towards a target, and the recipe has "
            "none: add sets.target"
        )
    ids = [i for bucket in context.buckets for i in context.in_play(bucket)]
    rows = context.rows_of(warm_share(ids, asked.share, options.seed))
    models = context.workspace.model("warmup").parent
    context.opened.close()  # what other engines hold is memory the training may want
    snapshots = warmed(spec, rows, models, asked, options.seed, context.emit)
    sets = [Pool(context.workspace.pool(s.name)) for s in context.recipe.sets.target]
    count = len(ids) + sum(pool.manifest.rows("rows") for pool in sets)
    progress = Progress(context.stage.name, count * len(snapshots), context.emit, "gradients")
    store = context.workspace.store
    pool: dict[str, np.ndarray] = {}
    failed: dict[str, str] = {}
    aim: dict[str, np.ndarray] = {}
    with differentiating(spec, snapshots, asked, options.seed, store, progress.advance) as workers:
        for wanted in sets:  # first: few rows, and one without features ends the stage
            buckets = by_store_bucket(wanted.rows, wanted.buckets)
            for _, (found, reasons) in features(workers, buckets, target=True):
                aim |= found
                _all_there(reasons)
        for _, (found, reasons) in features(workers, context.store_buckets(), target=False):
            pool |= found
            failed |= reasons
        tally = total([recorder for worker in workers for recorder in worker])
    progress.close()
    facts = {
        "warmup_rows": rows.num_rows,
        "checkpoints": [] if snapshots == [None] else [[s.step, s.weight] for s in snapshots],
        "gradients_computed": tally.computed,
        "gradients_found": tally.found,
    }
    return Featured(pool, aim, failed, facts)


def warmed_likelihoods(context: Context, method: Any) -> tuple[pl.DataFrame, dict[str, str], Facts]:
    """Mean log-probabilities of the rows in play under the model warmed up on the target sets.

    Args:
        context: The stage.
        method: Its method, whose options say how the warm-up is done (`baselines.LossDrop`).

    Returns:
        Columns id and the method's `after`; reasons by id; and facts of the warm-up.

    Raises:
        ValueError: if the recipe has no target set, or its model can't be trained.
    """
    from siftline.training.finetune import FineTune, finetune
    from siftline.training.gradients import check_model

    name, spec = context.stage.name, context.spec("target")
    check_model(spec)
    sets = [Pool(context.workspace.pool(one.name)) for one in context.recipe.sets.target]
    if not sets:
        raise ValueError(
            f"{name}: {context.stage.options.method} warms up on a target, and the recipe has "
            "none: add sets.target"
        )
    asked = FineTune(
        method="lora",
        lora_rank=method.lora_rank,
        epochs=method.epochs,
        learning_rate=method.learning_rate,
        batch_rows=method.batch_rows,
        max_length=spec.max_length,
        save_steps=100,
    )
    rows = pa.concat_tables([pool.all_rows().select(["id", "messages", "tools"]) for pool in sets])
    first = pl.Series(rows["id"].to_pylist(), dtype=pl.String).is_first_distinct()
    rows = rows.filter(pa.array(first.to_list())).sort_by("id")
    key = content_hash([identity(spec), rows["id"].to_pylist(), asdict(asked), method.seed])
    context.opened.close()  # what other engines hold is memory the training may want
    progress = Progress(f"{name} warm-up", 0, context.emit, "steps")
    done = finetune(
        Path(spec.path).expanduser(),
        rows,
        context.workspace.model(f"warmup-{key[:12]}"),
        asked,
        seed=method.seed,
        dataset_version=f"{context.recipe.name}/{name} target",
        template=spec.template,
        progress=progress.reach,
    )
    progress.close()
    warm = replace(spec, path=str(done.model_dir), revision=None)
    count = sum(len(context.in_play(bucket)) for bucket in context.buckets)
    progress = Progress(name, count, context.emit, "warm rows")
    recorders = context.opened.recorders(warm, context.workspace.store, progress.advance)

    def work(recorder: Recorder, bucket: int, part: pa.Table) -> Any:
        lines, reasons = score_likelihood(recorder, bucket, part)
        return lines.select("id", pl.col("logprob_mean").alias(method.after)), reasons

    frames = [pl.DataFrame(schema={"id": pl.String, method.after: pl.Float64})]
    failed: dict[str, str] = {}
    for _, (lines, reasons) in over_buckets(recorders, context.store_buckets(), work):
        frames.append(lines)
        failed |= reasons
    progress.close()
    losses = done.curve["loss"]
    facts = {"target_rows": rows.num_rows, "warmup_steps": done.steps}
    facts |= {"warmup_skipped": done.skipped.height, "warmup_loss": [losses[0], losses[-1]]}
    return pl.concat(frames), failed, facts


def _all_there(reasons: dict[str, str]) -> None:
    """Refuses target rows without features."""
    if reasons:
        first = min(reasons)
        raise ValueError(
            f"{len(reasons)} target rows have no gradient features, first {first} "
            f"({reasons[first]}): take them out"
        )
