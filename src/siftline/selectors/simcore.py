"""SimCore: rows nearest to the target's clusters, until they stop being near.

Kim et al. 2023 (CVPR), arXiv 2303.11101, for images; no result with language models is published.
The target's vectors are clustered; in each turn every centroid takes the nearest row nobody has
(two may agree on one), and the turn's utility is the mean of those similarities. It ends before a
turn whose utility is below tau times that of turn `patience`. That is the released code's rule; the
paper is read as comparing with the first turn, which is `patience=1`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from siftline.kernels.draws import uniforms
from siftline.kernels.vectors.blocks import cosine_blocks, unit
from siftline.kernels.vectors.kmeans import kmeans
from siftline.kernels.vectors.topk import Lists, top_lists
from siftline.selectors.method import Ranked, Ranking, amounts_of
from siftline.selectors.spending import Budget, Spent, spend_lazily
from siftline.selectors.vectors import both, target_rows


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
        turns = Turns([], [], [], None, False)

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

    def _take(self, lists: Lists, k: int) -> "Turns":
        """Plays turns until k rows are taken, the rule ends it, or nothing is left."""
        q, r = lists.rows.shape
        at = [0] * q
        places = [line.tolist() for line in lists.rows]
        taken: set[int] = set()
        turns = Turns([], [], [], None, False)
        threshold = -np.inf
        while len(taken) < k:
            picks: dict[int, float] = {}
            similarities = []
            for query in range(q):
                while at[query] < r and places[query][at[query]] in taken:
                    at[query] += 1
                if at[query] == r:
                    return Turns(turns.rows, turns.scores, turns.utility, None, not lists.whole)
                similarity = float(lists.scores[query, at[query]])
                place = places[query][at[query]]
                picks[place] = max(similarity, picks.get(place, -np.inf))
                similarities.append(similarity)
            utility = float(np.mean(similarities))
            turns.utility.append(utility)
            if self.stop and utility < threshold:
                return Turns(turns.rows, turns.scores, turns.utility, len(turns.utility), False)
            if len(turns.utility) == self.patience:
                threshold = self.tau * utility
            taken |= picks.keys()
            turns.rows.append(list(picks))
            turns.scores.append(picks)
        return turns


@dataclass(frozen=True)
class Turns:
    """Rows taken in each turn with their similarities, utilities, and where the rule ended it."""

    rows: list[list[int]]
    scores: list[dict[int, float]]
    utility: list[float]
    stop: int | None
    starved: bool
