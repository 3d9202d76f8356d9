"""Shares of a whole by source: how a budget is split, and what a small source leaves to the others.

A mixture names sources with weights; `*` stands for all that are not named, in one group. Weights
need not add up to anything.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from siftline.kernels.quotas import largest_remainder

REST = "*"
"""Every source that a mixture does not name."""


def check_mixture(mixture: Mapping[str, float], what: str) -> None:
    """Refuses weights that split nothing.

    Raises:
        ValueError: if a weight is negative or not finite, or none is above 0.
    """
    for source, weight in mixture.items():
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"{what}: the weight of {source!r} is {weight}: give 0 or above")
    if not any(mixture.values()):
        raise ValueError(f"{what}: no source has a weight above 0: name one")


def group_of(mixture: Mapping[str, float]) -> pl.Expr:
    """Expression on the column `source`: its group in the mixture, null where it takes no part."""
    asked = sorted(name for name, weight in mixture.items() if weight > 0)
    source = pl.col("source").cast(pl.String)
    rest = pl.lit(REST) if REST in asked else pl.lit(None, pl.String)
    named = pl.when(source.is_in(asked)).then(source)
    return named.when(source.is_in(list(mixture)).fill_null(False)).then(None).otherwise(rest)


def split(
    mixture: Mapping[str, float], size: int, capacity: Mapping[str, int] | None = None
) -> pl.DataFrame:
    """Splits a size over the groups of a mixture, by largest remainder.

    Args:
        mixture: Weights; groups of weight 0 take no part.
        size: What to split: rows or tokens.
        capacity: Most that each group has; a group that is not there has nothing. None: no limit.

    Returns:
        A line a group, by name: source, weight (its part of 1), share (of the size, before
        capacities), capacity, quota (after: what one group lacks goes to the others, by weight),
        shortfall (share less capacity, where that is positive). Quotas add up to the size, or to
        all capacities where those are less.
    """
    names = sorted(name for name, weight in mixture.items() if weight > 0)
    # Scaled by the largest first, so that no sum overflows.
    weights = np.array([mixture[name] for name in names]) / max(mixture[name] for name in names)
    room = None
    if capacity is not None:
        room = np.array([capacity.get(name, 0) for name in names], dtype=np.int64)
    share = largest_remainder(weights, size)
    held = np.full(len(names), size, dtype=np.int64) if room is None else room
    columns: dict[str, Any] = {
        "source": names,
        "weight": weights / weights.sum(),
        "share": share,
        "capacity": held,
        "quota": largest_remainder(weights, size, room),
        "shortfall": np.maximum(share - held, 0),
    }
    return pl.DataFrame(columns)
