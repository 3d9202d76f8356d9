"""One interface for every selection method, and what most of them share.

A method is a frozen dataclass (its fields are its options) with

    summarise(bucket)                -> state      narrow columns of one bucket, never its text
    decide(states, budget, target)   -> plan       the global decision
    apply(bucket, plan)              -> Selection

`bucket` and `target` are polars frames with `id` and what the method needs of `n_tokens`, score
columns, `source`, `prompt_id`, `embedding` (pl.Array of float16 or float32). Methods that compare
words are the exception: they read `text` in `summarise` and keep hashed counts of it. A selection's
`tables["ranks"]` has `id` and `rank`: the order of preference from 1, null where a row has no place
in it. `select` runs the three steps on a pool that is one bucket. A method may have a step more,

    score(bucket, target)            -> state      in place of summarise, without the vectors

for callers that read vectors part by part; `decide` takes what either gave.

Everything is put in the order of ids before anything is computed, so neither the order of rows nor
the number of buckets can show.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import polars as pl

from siftline.rows.selection import Selection, decisions
from siftline.selectors.spending import Budget, Spent

MAX_ROWS = 100_000_000
"""Rows that methods without embeddings decide over; their docstrings say at what memory."""
MAX_VALUES = 4_000_000_000
"""Embedding values held at once: 8 GB at float16, and twice that while a method decides (buckets as
they came, and all rows sorted by id). A recipe's stage gathers them first, for about 300 bytes a
row more. What a method holds on top is in its docstring."""
RANKS = "ranks"

State = TypeVar("State")
Plan_ = TypeVar("Plan_")


class Method(Protocol[State, Plan_]):
    """The contract of a selection method; see the module's docstring."""

    def summarise(self, bucket: pl.DataFrame) -> State: ...
    def decide(
        self, states: Sequence[State], budget: Budget, target: pl.DataFrame | None = None
    ) -> Plan_: ...
    def apply(self, bucket: pl.DataFrame, plan: Plan_) -> Selection: ...


def select(
    method: Method[State, Plan_],
    frame: pl.DataFrame,
    budget: Budget,
    target: pl.DataFrame | None = None,
) -> Selection:
    """Runs a method on a pool that is one bucket."""
    plan = method.decide([method.summarise(frame)], budget, target)
    return method.apply(frame, plan)


@dataclass(frozen=True)
class Ranking:
    """What a method found about a pool of n rows in the order of their ids.

    Attributes:
        order: Places, most wanted first; rows that are barred or never reached may be missing.
        spent: What the budget bought of them.
        values: float64 number that decided about each row, shape (n,); NaN for none.
        reason: Why a row went that is not barred.
        barred: Reasons of rows that could not be chosen at all, strings with nulls, n of them.
        lost_to: Place of the row that each lost to, int64, -1 for none, shape (n,).
        facts: Numbers worth showing.
        tables: Side tables.
        stopped: True where the method itself ended before the budget, which is then no shortfall.
    """

    order: np.ndarray
    spent: Spent
    values: np.ndarray
    reason: str = "not_selected"
    barred: pl.Series | None = None
    lost_to: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    stopped: bool = False


@dataclass(frozen=True)
class Plan:
    """The decision about every row, with `rank`; facts and tables of the whole pool."""

    rows: pl.DataFrame
    facts: dict[str, Any]
    tables: dict[str, pl.DataFrame]
    vacuous: bool


class Ranked:
    """Steps that are the same for methods that rank rows and spend a budget down the ranking.

    A subclass says which `columns` it reads and ranks a pool that is sorted by id.
    """

    MAX: ClassVar[int] = MAX_ROWS

    def columns(self) -> dict[str, Any]:
        """Columns it reads beside `id` and their types; `pl.Array` stands for an embedding."""
        return {}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        """Ranks the pool, sorted by id with distinct ids, and spends the budget."""
        raise AssertionError("a method without a ranking")

    def summarise(self, bucket: pl.DataFrame) -> pl.DataFrame:
        wanted = self.columns()
        for name in wanted:
            if name not in bucket.columns:
                raise ValueError(f"no column {name!r}: {_remedy(name)}")
        narrow = [pl.col("id").cast(pl.String)]
        narrow += [pl.col(n) if t is pl.Array else pl.col(n).cast(t) for n, t in wanted.items()]
        if "n_tokens" in bucket.columns and "n_tokens" not in wanted:
            narrow.append(pl.col("n_tokens").cast(pl.Int64))
        rows = bucket.select(narrow)
        for name, kind in wanted.items():
            fault = pl.col(name).is_null()
            if kind in (pl.Float64, pl.Float32):
                fault = ~pl.col(name).is_finite().fill_null(False)
            missing = rows.filter(fault)
            if not missing.is_empty():
                raise ValueError(
                    f"{missing.height} of {rows.height} rows have no {name}, first "
                    f"{missing['id'][0]}: {_remedy(name)}, or leave these rows out"
                )
        return rows

    def decide(
        self, states: Sequence[pl.DataFrame], budget: Budget, target: pl.DataFrame | None = None
    ) -> Plan:
        pool = gathered(states, self.MAX)
        return planned(pool, self.rank(pool, budget, target), budget)

    def apply(self, bucket: pl.DataFrame, plan: Plan) -> Selection:
        return applied(bucket["id"], plan)


def gathered(states: Sequence[pl.DataFrame], limit: int) -> pl.DataFrame:
    """All rows sorted by id.

    Raises:
        ValueError: for no rows, an id that comes twice, or more rows or values than the limit.
    """
    pool = pl.concat([state for state in states if state.height] or list(states)).sort("id")
    if pool.is_empty():
        raise ValueError("no rows to select from: give a pool that has some")
    if pool["id"].is_duplicated().any():
        twice = pool["id"].filter(pool["id"].is_duplicated())[0]
        raise ValueError(f"id {twice} comes twice: give each row once")
    if pool.height > limit:
        raise ValueError(
            f"{pool.height} rows, and this method takes {limit} at most: draw a part with "
            "random first, or use a method without that limit"
        )
    if "n_tokens" in pool.columns and (pool["n_tokens"].fill_null(0) < 1).any():
        bad = pool.filter(pl.col("n_tokens").fill_null(0) < 1)["id"]
        raise ValueError(f"{len(bad)} rows have no n_tokens above 0, first {bad[0]}: score them")
    return pool


def amounts_of(pool: pl.DataFrame, budget: Budget) -> np.ndarray:
    """What each row costs: 1, or its loss tokens; int64, shape (n,)."""
    if budget.unit == "rows":
        return np.ones(pool.height, dtype=np.int64)
    if "n_tokens" not in pool.columns:
        raise ValueError("a budget in loss_tokens needs n_tokens of every row: score them first")
    return pool["n_tokens"].to_numpy().astype(np.int64)


def planned(pool: pl.DataFrame, found: Ranking, budget: Budget) -> Plan:
    """Turns a ranking into decisions.

    Raises:
        ValueError: if the pool has less than the budget and that is an error, or nothing fits.
    """
    n = pool.height
    kept = np.zeros(n, dtype=bool)
    kept[found.spent.rows] = True
    # Chosen rows come first in the order they were taken, then the others that were ranked.
    ranked = np.concatenate([found.spent.rows, found.order[~kept[found.order]]])
    ranks = np.zeros(n, dtype=np.int64)
    ranks[ranked] = np.arange(1, len(ranked) + 1)
    ids = pool["id"]
    barred = pl.Series([None] * n, dtype=pl.String) if found.barred is None else found.barred
    lost = None
    if found.lost_to is not None:
        places = pl.Series(found.lost_to, dtype=pl.Int64).replace(-1, None)
        lost = ids.gather(places)
    table = decisions(
        ids,
        kept=pl.Series(kept),
        reason=barred.fill_null(found.reason),
        value=pl.Series(np.asarray(found.values, dtype=np.float64)).fill_nan(None),
        matched_id=lost,
    )
    rank = pl.Series("rank", ranks, dtype=pl.Int64)
    rows = table.with_columns(pl.when(rank > 0).then(rank).alias("rank"))
    size, spent = budget.size, found.spent.amount
    left_over = bool(len(ranked) > len(found.spent.rows))
    short = 0 if found.stopped or (left_over and budget.unit != "rows") else max(0, size - spent)
    facts = {"rows": n, "kept": int(kept.sum()), "unit": budget.unit, "size": size}
    facts |= {"spent": spent, "shortfall": short, **found.facts}
    if short and budget.on_shortfall == "error":
        raise ValueError(_complaint(budget, facts, found))
    if not kept.any():
        what = "no row can be chosen" if short else "the shortest row on offer is longer"
        raise ValueError(f"a budget of {size} {budget.unit} buys nothing, {what}: raise it")
    return Plan(rows, facts, found.tables, vacuous=bool(kept.all()))


def applied(ids: pl.Series, plan: Plan) -> Selection:
    """The plan's decisions about some rows."""
    rows = pl.DataFrame({"id": ids.cast(pl.String)})
    rows = rows.join(plan.rows, on="id", how="left", validate="1:1").sort("id")
    unknown = rows.filter(pl.col("kept").is_null())
    assert unknown.is_empty(), f"{unknown.height} rows that were not summarised"
    tables = {**plan.tables, RANKS: rows.select("id", "rank")}
    return Selection(rows.drop("rank"), plan.facts, tables, plan.vacuous)


def by_value(values: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """Places by value, largest first, ties by place (so by id); only those allowed, if given."""
    order = np.lexsort((np.arange(len(values)), -values))
    return order if allowed is None else order[allowed[order]]


def _remedy(name: str) -> str:
    if name == "embedding":
        return "embed every row"
    if name in ("source", "prompt_id"):
        return f"give {name} of every row"
    return "score every row, or name a column that is there"


def _complaint(budget: Budget, facts: dict[str, Any], found: Ranking) -> str:
    """The shortfall in one line: how much, why, what to do."""
    barred = pl.Series([], dtype=pl.String) if found.barred is None else found.barred.drop_nulls()
    tally = barred.rename("reason").value_counts().sort("reason")
    why = ", ".join(f"{count} {reason}" for reason, count in tally.iter_rows())
    return (
        f"the budget is {budget.size} {budget.unit}, and of {facts['rows']} rows the method can "
        f"keep {facts['spent']}{f' ({why})' if why else ''}: lower the budget, give more rows, or "
        "set on_shortfall to smaller"
    )
