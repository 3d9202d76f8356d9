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

Embeddings as selectors read them: fixed-size lists of a frame, checked once.

A selection method as the table of methods shows it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import polars as pl

from siftline.rows.selection import Selection, decisions
from siftline.selectors.spending import Budget, Spent

_CHECKED = 1 << 14


def matrix(frame: pl.DataFrame, what: str = "rows") -> np.ndarray:
    """The `embedding` column as a matrix, float16 or float32, shape (n, d).

    Raises:
        ValueError: if it is no fixed-size list, too large, or holds NaN, infinity or nulls.
    """
    dtype = frame.schema["embedding"]
    if not isinstance(dtype, pl.Array) or len(dtype.shape) != 1:
        raise ValueError(f"embedding of {what} is {dtype}: store fixed-size lists (pl.Array)")
    if dtype.inner not in (pl.Float16, pl.Float32):
        raise ValueError(f"embedding of {what} holds {dtype.inner}: store float16 or float32")
    values = frame.height * dtype.shape[0]
    if values > MAX_VALUES:
        raise ValueError(
            f"{frame.height} {what} x {dtype.shape[0]} dimensions is over {MAX_VALUES} values: "
            "draw a part with random first, or embed with fewer dimensions"
        )
    x = frame["embedding"].to_numpy()
    for start in range(0, len(x), _CHECKED):
        bad = np.flatnonzero(~np.isfinite(x[start : start + _CHECKED]).all(axis=1))
        if len(bad):
            identity = frame["id"][int(start + bad[0])]
            raise ValueError(
                f"embeddings of {what} hold NaN or infinity, first {identity}: embed it again, "
                "in float32 where float16 overflows"
            )
    return x


def target_rows(target: pl.DataFrame | None, needed: str) -> pl.DataFrame:
    """The target's rows, sorted by id.

    Raises:
        ValueError: if there are none, one comes twice, or they lack the column `needed`.
    """
    if target is None or target.is_empty():
        raise ValueError("the target set is empty: give rows like those the model shall be good at")
    if needed not in target.columns:
        raise ValueError(f"the target rows have no {needed}: give it for the pool and the target")
    if target["id"].is_duplicated().any():
        twice = target["id"].filter(target["id"].is_duplicated())[0]
        raise ValueError(f"target id {twice} comes twice: give each row once")
    return target.sort("id")


def both(pool: pl.DataFrame, target: pl.DataFrame | None) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of a pool and of its target, each in the order of ids.

    Raises:
        ValueError: as `matrix` and `target_rows`, or if their widths differ.
    """
    x, y = matrix(pool), matrix(target_rows(target, "embedding"), "target rows")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"embeddings have {x.shape[1]} dimensions in the pool and {y.shape[1]} in the target: "
            "embed both with one model"
        )
    return x, y


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


Need = Literal[
    "source",  # the name of the source of each row
    "prompts",  # prompt_id of each row
    "scores",  # one score column or more
    "embeddings",
    "text",
    "target embeddings",
    "target text",
    "gradients",  # gradient features, as recipes and `siftline score --gradients` make them
    "target gradients",
    "target warm-up",  # the likelihood under the model trained on the target, as recipes make it
    "training",  # models trained between its rounds, which recipes alone do
]
Scope = Literal["bucketed", "global"]
WIDTH = 384
"""Dimensions that the limits of methods with embeddings are stated for."""


@dataclass(frozen=True)
class Entry:
    """A method as the table shows it.

    Attributes:
        name: What it is called on the command line and in recipes.
        method: The frozen dataclass; its fields are its options.
        needs: What its buckets, and the target, must hold.
        scope: "bucketed" keeps a few numbers a row; "global" holds embeddings or word counts of all
            rows at once.
        limit: Most rows it takes (of 384 dimensions where it reads embeddings, of the default
            features where it reads gradients).
        good_for: One line.
        warning: One line.
        source: Paper or repository.
        width: Values a row that the limit is stated for, where it is one of values: narrower rows
            may be more. None where the limit is one of rows.
        distribution: The package that registered it, None for siftline's and for import paths.
    """

    name: str
    method: type[Any]
    needs: tuple[Need, ...]
    scope: Scope
    limit: int
    good_for: str
    warning: str
    source: str
    width: int | None = None
    distribution: str | None = None

    @property
    def own(self) -> bool:
        """Whether it is a user's own, registered or by import path."""
        return ":" in self.name or self.distribution is not None

    @property
    def targeted(self) -> bool:
        """Whether it selects towards a target set."""
        return any(need.startswith("target") for need in self.needs)

    @property
    def conversations(self) -> bool:
        """Whether it wants whole conversations embedded, roles and all, and not their text."""
        return getattr(self.method, "EMBEDS", "text") == "conversation"

    def limit_at(self, width: int) -> int:
        """Most rows it takes where the vectors it reads have so many values a row."""
        return self.limit if self.width is None else MAX_VALUES // width

    def options(self) -> dict[str, Any]:
        """Its options with their defaults."""
        default = self.method()
        return {f.name: getattr(default, f.name) for f in dataclasses.fields(default) if f.init}

    def needed_columns(self, method: Any) -> tuple[str, ...]:
        """Score columns that a configured method reads beside what every row has."""
        given = {"id", "n_tokens", "source", "prompt_id", "embedding", "text"}
        asked = method.columns() if hasattr(method, "columns") else {}
        return tuple(name for name in asked if name not in given)
