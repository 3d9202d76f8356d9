"""What a selection may keep, and how an order of preference is turned into a selection.

Shares of a whole by source: how a budget is split, and what a small source leaves to the others.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.kernels.draws import largest_remainder

PASSED_OVER = 1000
"""Rows too long for what is left of a token budget that are passed over before it is closed."""


@dataclass(frozen=True)
class Budget:
    """What a selection may keep.

    Attributes:
        size: How much, in `unit`.
        unit: "rows", or "loss_tokens" by the rows' `n_tokens`.
        on_shortfall: When the pool has less: "error", or a "smaller" selection.
    """

    size: int
    unit: Literal["rows", "loss_tokens"] = "rows"
    on_shortfall: Literal["error", "smaller"] = "error"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"budget is {self.size}: give 1 or more")
        if self.unit not in ("rows", "loss_tokens"):
            raise ValueError(f"unit is {self.unit!r}: use 'rows' or 'loss_tokens'")
        if self.on_shortfall not in ("error", "smaller"):
            raise ValueError(f"on_shortfall is {self.on_shortfall!r}: use 'error' or 'smaller'")

    def likely_rows(self, amounts: np.ndarray) -> int:
        """Rows it may take to spend it, a first guess for methods that order no more than asked."""
        if self.unit == "rows" or not len(amounts):
            return min(self.size, len(amounts))
        mean = max(1.0, float(amounts.mean()))
        return min(len(amounts), int(1.25 * self.size / mean) + PASSED_OVER)


@dataclass(frozen=True)
class Spent:
    """Rows an order of preference bought.

    Attributes:
        rows: Places of the rows, in the order taken.
        amount: What they cost.
        done: False where the order ended before the budget did.
    """

    rows: np.ndarray
    amount: int
    done: bool


def spend(order: np.ndarray, amounts: np.ndarray, budget: Budget) -> Spent:
    """Takes rows in order while they fit.

    In rows that is the first `size`. In tokens a row that does not fit is passed over, so that one
    long answer does not end a selection; after `PASSED_OVER` such rows on end, or when not even the
    shortest would fit, it is closed.

    Args:
        order: Places, most wanted first, shape (k,); no place twice.
        amounts: Cost of every row of the pool, shape (n,): 1, or loss tokens.
        budget: The budget.
    """
    if budget.unit == "rows":
        taken = order[: budget.size]
        return Spent(taken, len(taken), len(taken) == budget.size)
    costs = amounts[order]
    fits = np.cumsum(costs) <= budget.size
    whole = len(order) if fits.all() else int(np.argmin(fits))
    chosen, room = list(order[:whole]), budget.size - int(costs[:whole].sum())
    least = int(amounts.min()) if len(amounts) else 0
    passed = 0
    for place, cost in zip(order[whole:].tolist(), costs[whole:].tolist(), strict=True):
        if room < least or passed == PASSED_OVER:
            break
        if cost <= room:
            chosen.append(place)
            room, passed = room - cost, 0
        else:
            passed += 1
    done = room < least or passed == PASSED_OVER
    return Spent(np.array(chosen, dtype=np.int64), budget.size - room, done)


def spend_lazily(
    ordered: Callable[[int], np.ndarray], amounts: np.ndarray, budget: Budget
) -> tuple[np.ndarray, Spent]:
    """`spend` for an order that costs more the further it goes.

    Args:
        ordered: Gives the first k places of the order; fewer where it ends before.
        amounts: Cost of every row, shape (n,).
        budget: The budget.

    Returns:
        As much of the order as was needed, and what it bought.
    """
    k = budget.likely_rows(amounts)
    while True:
        order = ordered(k)
        spent = spend(order, amounts, budget)
        if spent.done or len(order) < k or k == len(amounts):
            return order, spent
        k = min(2 * k, len(amounts))


@dataclass(frozen=True)
class Shares:
    """A budget split over groups.

    Attributes:
        order: Places of all rows: first what the quotas bought, then the others, each by the share
            of its group that stands before it, so that a part of the order is balanced too.
        spent: What was bought.
        ranks: Rank of every row in its group, from 1, shape (n,).
        quotas: Amount each group may spend, shape (groups,).
    """

    order: np.ndarray
    spent: Spent
    ranks: np.ndarray
    quotas: np.ndarray


def spend_by_group(
    groups: np.ndarray, keys: np.ndarray, weights: np.ndarray, amounts: np.ndarray, budget: Budget
) -> Shares:
    """Splits a budget over groups and takes the rows with the largest keys of each.

    Quotas come by largest remainder, and what a small group can't use goes to the others. In tokens
    a quota rarely ends on a row's edge: what is left over goes to the first rows that still fit.

    Args:
        groups: Group 0..k-1 of each row, shape (n,).
        keys: Preference inside a group, larger first, ties by place; shape (n,).
        weights: Share of each group, shape (k,).
        amounts: Cost of each row, shape (n,).
        budget: The budget.
    """
    by_group = np.lexsort((np.arange(len(keys)), -keys, groups))
    counts = np.bincount(groups, minlength=len(weights))
    starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[by_group] = np.arange(len(keys)) - np.repeat(starts, counts) + 1
    costs = amounts[by_group]
    totals = np.bincount(groups, weights=amounts, minlength=len(weights)).astype(np.int64)
    quotas = largest_remainder(weights, budget.size, totals)
    before = np.concatenate([[0], np.cumsum(costs)])
    so_far = np.empty(len(keys), dtype=np.int64)
    so_far[by_group] = before[1:] - np.repeat(before[starts], counts)
    bought = so_far <= quotas[groups]
    depth = (ranks - 0.5) / counts[groups]
    order = np.lexsort((np.arange(len(keys)), depth, ~bought))
    return Shares(order, spend(order, amounts, budget), ranks, quotas)


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
