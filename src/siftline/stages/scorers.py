"""Quality scores of a pool: tables that a shortlist can weigh by and a version carries along.

A scorer sees the whole pool once. Rows that a stage adds later have no quality score.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.progress import Progress
from siftline.recipe.parse import Recipe, expand
from siftline.rows.schema import HALF_ID
from siftline.rows.shards import Manifest
from siftline.rows.verified import file_hash
from siftline.scoring.measures import classifiers, likelihood
from siftline.scoring.measures import judge as rubric
from siftline.scoring.measures.classifiers import Classifier, Reward
from siftline.scoring.measures.columns import Function, attach_leftovers
from siftline.scoring.measures.contrast import Contrast
from siftline.scoring.measures.judge import Rubric
from siftline.scoring.measures.scorers import (
    columns_of,
    models_of,
    needs_classifier,
    needs_leftovers,
    run_scorer,
)
from siftline.scoring.recorder import Recorder
from siftline.stages.context import Context, by_store_bucket
from siftline.stages.models import Engines, counted, identity, named_spec, over_buckets, total
from siftline.stages.scores import Observe, ScoreTable, observed
from siftline.workspace import Workspace

VERSION = 1
"""Raise it when a scorer's table changes for equal inputs."""
_KINDS: dict[type, Any] = {
    Reward: classifiers.VERSION,
    Classifier: classifiers.VERSION,
    Rubric: rubric.VERSION,
    Contrast: likelihood.VERSION,
}
ROWS = "rows"
"""Stands for the model in the name of a scorer that asks none."""


def scorer_model(recipe: Recipe, name: str) -> str:
    """The model a scorer's table is named by: its first, or `ROWS`."""
    return next(iter(models_of(recipe.scorers[name])), ROWS)


def scorer_table(workspace: Workspace, recipe: Recipe, name: str) -> ScoreTable:
    """The table of a scorer; its models must be there."""
    config = recipe.scorers[name]
    pool = Pool(workspace.pool(recipe.pool.name))
    inputs = {
        "table": VERSION,
        "pool": pool.version,
        "buckets": pool.buckets,
        "kind": type(config).__name__,
        "config": _plain(asdict(config)),
        "versions": _versions(config),
        "models": {m: identity(named_spec(workspace, recipe, m)) for m in models_of(config)},
    }
    numbers = [(column, pa.float64()) for column in list(columns_of(config))[1:]]
    folder = workspace.scores(recipe.pool.name, scorer_model(recipe, name), name)
    return ScoreTable(folder, pa.schema([("id", pa.string()), *numbers]), inputs)


def _versions(config: Any) -> Any:
    """What a scorer's own code is: our versions of its kind, or the user's source file.

    Raises:
        ValueError: if the user's function can't be imported.
    """
    if isinstance(config, Function):
        function = inspect.unwrap(config.load())
        try:
            source = inspect.getsourcefile(function)
        except TypeError:  # an object that can be called
            source = getattr(sys.modules[config.path.partition(":")[0]], "__file__", None)
        return file_hash(Path(source)) if source is not None else None
    return _KINDS.get(type(config))


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON; a file counts by its content, not by its path."""
    path = options.get("path")
    if path is not None and Path(expand(path)).is_file():
        return {**options, "path": file_hash(Path(expand(path)))}
    return options


def _expanded(config: Any) -> Any:
    """A file's path without variables."""
    path = getattr(config, "path", None)
    return replace(config, path=expand(path)) if path is not None else config


def _with_leftovers(pool: Pool) -> Callable[[int], pa.Table]:
    """Reads rows together with the input fields that no mapping used."""
    return lambda bucket: attach_leftovers(pool.rows(bucket), pool.read("provenance", bucket))


@dataclass(frozen=True)
class Scored:
    """A scorer's table: its manifest, and whether it was written now."""

    manifest: Manifest
    fresh: bool


def score_quality(
    workspace: Workspace,
    recipe: Recipe,
    name: str,
    opened: Engines,
    emit: Callable[[str], None],
    observe: Observe = lambda bucket, numbers: None,
) -> Scored:
    """Runs a scorer over a recipe's pool and writes its table, or finds it.

    Args:
        workspace: The root.
        recipe: The recipe.
        name: Name of the scorer.
        opened: Engines of this process.
        emit: Takes lines of progress.
        observe: Takes the numbers of each bucket.
    """
    table = scorer_table(workspace, recipe, name)
    found = table.finished()
    if found is not None:
        return Scored(found, False)
    config, pool = _expanded(recipe.scorers[name]), Pool(workspace.pool(recipe.pool.name))
    each = 4 if isinstance(config, Contrast) else 1  # with its prompt and without, by two models
    unit = "rows" if each == 1 else "forward rows"
    progress = Progress(name, each * pool.manifest.rows("rows"), emit, unit)
    seats = _seats(workspace, recipe, name, opened, progress)

    def work(
        seat: dict[str, Recorder], bucket: int, rows: pa.Table
    ) -> tuple[pl.DataFrame, dict[str, str]]:
        with counted(seat.values(), each * rows.num_rows, progress.advance):
            return run_scorer(config, seat, bucket, rows)

    rows = _with_leftovers(pool) if needs_leftovers(config) else pool.rows
    scored = over_buckets(seats, by_store_bucket(rows, pool.buckets), work)
    every = [recorder for seat in seats for recorder in seat.values()]
    manifest = table.write(pool, observed(scored, observe), lambda: asdict(total(every)))
    progress.close()
    return Scored(manifest, True)


def _seats(
    workspace: Workspace, recipe: Recipe, name: str, opened: Engines, progress: Progress
) -> list[dict[str, Recorder]]:
    """Recorders by model name, once for each device that all models of the scorer have."""
    config = recipe.scorers[name]
    models = models_of(config)
    each = [
        opened.recorders(
            named_spec(workspace, recipe, model),
            workspace.store,
            progress.advance,
            "classifier" if needs_classifier(config) else "causal",
        )
        for model in models
    ]
    return [dict(zip(models, seat, strict=True)) for seat in zip(*each, strict=False)] or [{}]


def score_versions(workspace: Workspace, recipe: Recipe) -> dict[str, str]:
    """Versions of the tables of a recipe's scorers.

    Raises:
        ValueError: naming the first that has not run with these settings.
    """
    found = {}
    for name in recipe.scorers:
        manifest = scorer_table(workspace, recipe, name).found()
        if manifest is None:
            raise ValueError(_not_run(recipe, name))
        found[name] = manifest.version
    return found


def _not_run(recipe: Recipe, name: str) -> str:
    place = f"scores/{recipe.pool.name}/{scorer_model(recipe, name)}/{name}"
    return f"no scores of {name!r} for this pool with these settings: materialize {place} first"


def quality(context: Context, name: str) -> pl.DataFrame:
    """Scores of the rows in play: id and the table's other columns; rows without one are left out.

    Raises:
        ValueError: if the scorer has not run on this pool with these settings.
    """
    read = scorer_table(context.workspace, context.recipe, name).reader()
    if read is None:
        raise ValueError(_not_run(context.recipe, name))
    frames = [
        read(bucket).filter(pl.col("id").is_in(context.in_play(bucket)))
        for bucket in context.buckets
    ]
    return pl.concat(frames)


def prompt_weights(context: Context, name: str) -> pl.DataFrame:
    """A weight in (0, 1] for each prompt in play: the rank of its best row among all prompts.

    Scores come on any scale and sign (logits, perplexities, probabilities); a rank says as much
    about the order and needs no unit. Ties share the higher weight. A prompt without a score gets
    0, which is drawn last.

    Returns:
        Columns prompt_id and weight.
    """
    best = (
        quality(context, name)
        .with_columns(pl.col("id").str.slice(0, HALF_ID).alias("prompt_id"))
        .group_by("prompt_id")
        .agg(pl.col("value").max())
        .sort("prompt_id")
    )
    return best.select("prompt_id", weight=pl.col("value").rank("max") / max(1, best.height))
