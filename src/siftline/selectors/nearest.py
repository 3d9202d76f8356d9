"""Rows nearest to target rows, by turns: what RDS+ and the lexical baseline share.

Round-robin (RDS+, algorithm 1): queries take turns, each takes the best row that is left. With
several tasks, a task's score of a row is the best of its queries, and tasks take turns. Lists of
the best rows stand in for all pairs; where one runs out the lists are asked for again, longer,
which changes nothing in what was taken before.

RDS+: rows whose representation is nearest to some target row, by turns.

SimCore: rows nearest to the target's clusters, until they stop being near.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl

from siftline.kernels.draws import uniforms
from siftline.kernels.vectors.blocks import cosine_blocks, unit
from siftline.kernels.vectors.kmeans import kmeans
from siftline.kernels.vectors.topk import Lists, Picks, round_robin, top_lists
from siftline.selectors.method import Ranked, Ranking, amounts_of, both, target_rows
from siftline.selectors.spending import Budget, Spent, spend_lazily

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


@dataclass(frozen=True)
class RdsPlus(Ranked):
    """Round-robin over target rows or tasks by cosine.

    Memory: the pool's embeddings twice, and for every taker a list of 4 x budget / takers + 64 rows
    (longer where one runs out), about 80 bytes each; blocks of scores take 60 MiB a core.

    Attributes:
        turns: "query": every target row takes in turn (algorithm 1, one task); "task": the
            target's sources take in turn by the best of their rows (several tasks).
    """

    EMBEDS: ClassVar[str] = "conversation"
    turns: Turns = "query"

    def __post_init__(self) -> None:
        if self.turns not in ("query", "task"):
            raise ValueError(f"turns is {self.turns!r}: use 'query' or 'task'")

    def columns(self) -> dict[str, Any]:
        return {"embedding": pl.Array}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        both(pool, target)  # checks both before anything is computed
        rows, names = takers(target, self.turns, "embedding")
        score, block = cosine_blocks(pool["embedding"].to_numpy(), rows["embedding"].to_numpy())
        return with_ids(by_turns(score, block, names, amounts_of(pool, budget), budget), pool)


@dataclass(frozen=True)
class SimCore(Ranked):
    """Nearest rows to target clusters with a stopping rule; ending early is no shortfall.

    Memory: the pool's embeddings twice, and for every cluster a list of 4 x budget / clusters + 64
    rows (longer where one runs out), about 80 bytes each; blocks of scores take 60 MiB a core.

    Attributes:
        clusters: Target clusters (the code: 100); with as many or more than target rows, each row
            is its own.
        tau: Share of the reference utility below which it ends (the code: 0.95). Ranges of cosines
            differ between embedders, so look at `utility` in the facts.
        patience: Turn whose utility is the reference, from 1 (the code: 20).
        stop: False spends the whole budget.
        seed: Seed of the clustering and of the draw that cuts the last turn.
    """

    clusters: int = 100
    tau: float = 0.95
    patience: int = 20
    stop: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clusters < 1 or self.patience < 1:
            raise ValueError(
                f"clusters {self.clusters}, patience {self.patience}: give at least 1 each"
            )
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau is {self.tau}: give a share, 0 to 1")

    def columns(self) -> dict[str, Any]:
        return {"embedding": pl.Array}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        x, y = both(pool, target)
        centroids = self._centroids(unit(y), target_rows(target, "embedding")["id"].to_list())
        score, block = cosine_blocks(x, centroids)
        n, q = len(x), len(centroids)
        u = uniforms(self.seed, "simcore", pool["id"].to_list())
        turns = Taken([], [], [], None, False)

        def ordered(k: int) -> np.ndarray:
            nonlocal turns
            r = min(n, 4 * -(-k // q) + 64)
            while True:
                turns = self._take(top_lists(n, q, r, block, score), k)
                if not turns.starved:
                    break
                r = min(n, 4 * r)
            # Inside a turn rows come by hash, so that cutting the last one is a fair draw.
            return np.array([i for t in turns.rows for i in sorted(t, key=lambda i: (u[i], i))])

        order, spent = spend_lazily(ordered, amounts_of(pool, budget), budget)
        order = order.astype(np.int64)
        stopped = turns.stop is not None and len(spent.rows) == len(order)
        values = np.full(n, np.nan)
        for found in turns.scores:
            for place, similarity in found.items():
                values[place] = similarity
        facts = {
            "target_clusters": q,
            "utility": [round(v, 6) for v in turns.utility],
            "stop_turn": turns.stop if stopped else None,
            "stop_reason": "utility" if stopped else "budget",
        }
        spent = Spent(spent.rows, spent.amount, spent.done or stopped)
        reason = "not_reached"
        return Ranking(order, spent, values, reason, facts=facts, stopped=stopped)

    def _centroids(self, y: np.ndarray, ids: list[str]) -> np.ndarray:
        if self.clusters >= len(y):
            return y
        return unit(kmeans(y, self.clusters, self.seed, ids).centroids)

    def _take(self, lists: Lists, k: int) -> "Taken":
        """Plays turns until k rows are taken, the rule ends it, or nothing is left."""
        q, r = lists.rows.shape
        at = [0] * q
        places = [line.tolist() for line in lists.rows]
        taken: set[int] = set()
        turns = Taken([], [], [], None, False)
        threshold = -np.inf
        while len(taken) < k:
            picks: dict[int, float] = {}
            similarities = []
            for query in range(q):
                while at[query] < r and places[query][at[query]] in taken:
                    at[query] += 1
                if at[query] == r:
                    return Taken(turns.rows, turns.scores, turns.utility, None, not lists.whole)
                similarity = float(lists.scores[query, at[query]])
                place = places[query][at[query]]
                picks[place] = max(similarity, picks.get(place, -np.inf))
                similarities.append(similarity)
            utility = float(np.mean(similarities))
            turns.utility.append(utility)
            if self.stop and utility < threshold:
                return Taken(turns.rows, turns.scores, turns.utility, len(turns.utility), False)
            if len(turns.utility) == self.patience:
                threshold = self.tau * utility
            taken |= picks.keys()
            turns.rows.append(list(picks))
            turns.scores.append(picks)
        return turns


@dataclass(frozen=True)
class Taken:
    """Rows taken in each turn with their similarities, utilities, and where the rule ended it."""

    rows: list[list[int]]
    scores: list[dict[int, float]]
    utility: list[float]
    stop: int | None
    starved: bool
