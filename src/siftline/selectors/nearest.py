"""Rows nearest to target rows, by turns: what RDS+ and the lexical baseline share.

Round-robin (RDS+, algorithm 1): queries take turns, each takes the best row that is left. With
several tasks, a task's score of a row is the best of its queries, and tasks take turns. Lists of
the best rows stand in for all pairs; where one runs out the lists are asked for again, longer,
which changes nothing in what was taken before.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.kernels.vectors.topk import Picks, round_robin, top_lists
from siftline.selectors.method import Ranking
from siftline.selectors.spending import Budget, spend_lazily
from siftline.selectors.vectors import target_rows

Turns = Literal["query", "task"]
TASK = "source"
"""Column of the target that names a row's task."""


def takers(
    target: pl.DataFrame | None, turns: Turns, needed: str
) -> tuple[pl.DataFrame, list[str]]:
    """Target rows in the order they are compared, and the task or the id of each.

    Raises:
        ValueError: as `target_rows`, or if turns go by task and a row has none.
    """
    rows = target_rows(target, needed)
    if turns == "query":
        return rows, rows["id"].to_list()
    if TASK not in rows.columns or rows[TASK].null_count():
        raise ValueError(f"turns by task need {TASK} of every target row: set turns to query")
    rows = rows.sort(TASK, "id")
    return rows, rows[TASK].to_list()


def by_turns(
    score: Callable[[int, int], np.ndarray],
    block: int,
    names: list[str],
    amounts: np.ndarray,
    budget: Budget,
) -> Ranking:
    """Ranks rows by round-robin.

    Args:
        score: `score(start, stop)` gives similarities float32 (stop - start, target rows).
        block: Rows of a block.
        names: Taker of each target row, equal ones beside each other.
        amounts: Cost of each row, shape (n,).
        budget: The budget.

    Returns:
        The ranking; `tables["picks"]` has place, taker and score of every row taken.
    """
    n, takers_ = len(amounts), list(dict.fromkeys(names))
    firsts = np.array([names.index(name) for name in takers_])

    def best_of(start: int, stop: int) -> np.ndarray:
        found = score(start, stop)
        if len(takers_) == len(names):
            return found
        best: np.ndarray = np.maximum.reduceat(found, firsts, axis=1)
        return best

    picks: Picks | None = None
    r = 0

    def ordered(k: int) -> np.ndarray:
        nonlocal picks, r
        # A list four times as long as a fair share rarely runs out, however they overlap.
        r = max(r, min(n, 4 * -(-k // len(takers_)) + 64))
        while True:
            picks = round_robin(top_lists(n, len(takers_), r, block, best_of), k)
            if not picks.starved:
                return picks.rows
            r = min(n, 4 * r)

    order, spent = spend_lazily(ordered, amounts, budget)
    assert picks is not None
    values = np.full(n, np.nan)
    values[picks.rows] = picks.scores
    table = pl.DataFrame(
        {
            "place": picks.rows,
            "taker": [takers_[q] for q in picks.queries.tolist()],
            "score": picks.scores,
        },
        schema={"place": pl.Int64, "taker": pl.String, "score": pl.Float32},
    )
    facts: dict[str, Any] = {"takers": len(takers_), "target_rows": len(names), "list_length": r}
    return Ranking(order, spent, values, "not_reached", facts=facts, tables={"picks": table})


def with_ids(found: Ranking, pool: pl.DataFrame) -> Ranking:
    """The same with ids for places in its table of picks."""
    picks = found.tables["picks"]
    ids = pool["id"].gather(picks["place"])
    table = picks.select(ids.alias("id"), "taker", "score")
    return Ranking(
        found.order,
        found.spent,
        found.values,
        found.reason,
        facts=found.facts,
        tables={"picks": table},
    )
