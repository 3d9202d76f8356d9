"""Quality scorers by kind: one number a row, from a model, a file, or the user's own function.

A recipe names them under `scorers: {name: {kind: …, …}}`. Each kind is a small configuration in a
module of its own; here stands only what they share: which models they need, and one call that
scores a store bucket.
"""

from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.scoring.measures.classifiers import (
    Classifier,
    Reward,
    score_classes,
    score_rewards,
)
from siftline.scoring.measures.columns import Column, Function, score_column, score_function
from siftline.scoring.measures.contrast import Contrast, score_contrast
from siftline.scoring.measures.judge import Rubric, score_rubric
from siftline.scoring.recorder import Recorder

Scorer = Reward | Classifier | Rubric | Contrast | Column | Function
KINDS: dict[str, type] = {
    "reward": Reward,
    "classifier": Classifier,
    "rubric": Rubric,
    "contrast": Contrast,
    "column": Column,
    "function": Function,
}
"""Configuration by the name a recipe gives as `kind`."""
EXTRA: dict[type, tuple[str, ...]] = {
    Rubric: ("mass",),
    Contrast: ("logprob_mean", "logprob_mean_reference"),
}
"""Columns beside id and value, Float64: the probability of all grades together; both means."""


def models_of(config: Scorer) -> tuple[str, ...]:
    """Names of the recipe's models that a scorer needs."""
    if isinstance(config, Contrast):
        return (config.model, config.reference)
    if isinstance(config, Column | Function):
        return ()
    return (config.model,)


def needs_classifier(config: Scorer) -> bool:
    """Whether its model is opened with `classifiers.open_classifier`, not `open_engine`."""
    return isinstance(config, Reward | Classifier)


def needs_leftovers(config: Scorer) -> bool:
    """Whether its rows must come through `columns.attach_leftovers`."""
    return isinstance(config, Column) and config.path is None


def columns_of(config: Scorer) -> dict[str, Any]:
    """Columns of `run_scorer`'s frame with their types."""
    extra = EXTRA.get(type(config), ())
    return {"id": pl.String, "value": pl.Float64, **dict.fromkeys(extra, pl.Float64)}


def run_scorer(
    config: Scorer, recorders: Mapping[str, Recorder], bucket: int, rows: pa.Table
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Scores the rows of one store bucket.

    Args:
        config: The scorer.
        recorders: By name, those of `models_of`.
        bucket: Store bucket that all rows belong to.
        rows: Columns of `schema.ROW`, ids distinct, in any order; see `needs_leftovers`.

    Returns:
        Columns of `columns_of`, one line per scored row, sorted by id; and reasons by id of all
        other rows.

    Raises:
        ValueError: if the scorer does not fit its models or its data; see the kind's function.
        RuntimeError: if a scorer by import path raises.
    """
    rows = rows.sort_by("id")
    found, failed = _score(config, recorders, bucket, rows)
    lines = [(i, *(v if isinstance(v, tuple) else (v,))) for i, v in sorted(found.items())]
    missing = set(rows.column("id").to_pylist()) ^ {*found, *failed}
    assert not missing, f"neither scored nor failed: {sorted(missing)[:3]}"
    assert not found.keys() & failed.keys(), "scored and failed"
    return pl.DataFrame(lines, schema=columns_of(config), orient="row"), failed


def _score(
    config: Scorer, recorders: Mapping[str, Recorder], bucket: int, rows: pa.Table
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values by id, in a tuple with the extra columns if there are any, and reasons by id."""
    if isinstance(config, Column):
        return score_column(config, rows)
    if isinstance(config, Function):
        return score_function(config, rows)
    model = recorders[config.model]
    if isinstance(config, Contrast):
        return score_contrast(config, model, recorders[config.reference], bucket, rows)
    if isinstance(config, Rubric):
        return score_rubric(config, model, bucket, rows)
    if isinstance(config, Reward):
        return score_rewards(config, model, bucket, rows)
    return score_classes(config, model, bucket, rows)
