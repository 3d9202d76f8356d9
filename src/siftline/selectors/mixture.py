"""Shares of a whole by source: how a budget is split, and what a small source leaves to the others.

A mixture names sources with weights; `*` stands for all that are not named, in one group. Weights
need not add up to anything. A temperature evens them out: each counts to the power of 1 over it, as
multilingual pre-training weighs languages by their size (mT5, arXiv 2010.11934, at 1 / 0.3). A cap
is the most that one group may have (T5's examples-proportional mixing, arXiv 1910.10683).
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


def check_evened(temperature: float, caps: Mapping[str, int], mixture: Mapping[str, float]) -> None:
    """Refuses a temperature or caps that mean nothing beside a mixture.

    Raises:
        ValueError: naming the value.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: give a number above 0; 1 changes nothing")
    for source, cap in caps.items():
        if cap < 1:
            raise ValueError(f"caps: that of {source!r} is {cap}: give 1 or more")
        if mixture and source != REST and not mixture.get(source):
            raise ValueError(f"caps: {source!r} has no weight in mixture: name it there too")


def tempered(weights: np.ndarray, temperature: float) -> np.ndarray:
    """Weights to the power of 1 / temperature, the largest being 1; zeros stay."""
    if not len(weights) or not weights.max():
        return weights.astype(np.float64)
    scaled = weights / weights.max()
    powers: np.ndarray = np.where(scaled > 0, scaled, 1.0) ** (1 / temperature)
    return np.where(scaled > 0, powers, 0.0)


def cap_of(caps: Mapping[str, int], name: str) -> int | None:
    """The cap of a group, that of `*` where it has none of its own."""
    return caps.get(name, caps.get(REST))


def group_of(mixture: Mapping[str, float]) -> pl.Expr:
    """Expression on the column `source`: its group in the mixture, null where it takes no part."""
    asked = sorted(name for name, weight in mixture.items() if weight > 0)
    source = pl.col("source").cast(pl.String)
    rest = pl.lit(REST) if REST in asked else pl.lit(None, pl.String)
    named = pl.when(source.is_in(asked)).then(source)
    return named.when(source.is_in(list(mixture)).fill_null(False)).then(None).otherwise(rest)


def split(
    mixture: Mapping[str, float],
    size: int,
    capacity: Mapping[str, int] | None = None,
    temperature: float = 1.0,
) -> pl.DataFrame:
    """Splits a size over the groups of a mixture, by largest remainder.

    Args:
        mixture: Weights; groups of weight 0 take no part.
        size: What to split: rows or tokens.
        capacity: Most that each group has; a group that is not there has nothing. None: no limit.
        temperature: See `tempered`.

    Returns:
        A line a group, by name: source, weight (its part of 1), share (of the size, before
        capacities), capacity, quota (after: what one group lacks goes to the others, by weight),
        shortfall (share less capacity, where that is positive). Quotas add up to the size, or to
        all capacities where those are less.
    """
    names = sorted(name for name, weight in mixture.items() if weight > 0)
    # Scaled by the largest, so that no sum overflows.
    weights = tempered(np.array([mixture[name] for name in names], np.float64), temperature)
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
