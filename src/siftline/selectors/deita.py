"""DEITA: the best rows by complexity times quality that are not too like one kept before.

Liu et al. 2024, arXiv 2312.15685. The greedy filter is sequential here: a row is held against every
row kept before it. The released code compares a batch with itself too, rejected rows included, so
its result depends on the batch size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from siftline.kernels.vectors.blocks import COSINE, on_grid
from siftline.selectors.method import Ranked, Ranking, amounts_of, by_value, matrix
from siftline.selectors.spending import Budget, Spent

BLOCK = 512


@dataclass(frozen=True)
class Deita(Ranked):
    """Score, sort, keep what is new. Time grows with rows looked at times rows kept.

    Memory: the pool's embeddings twice, and those of kept rows in float64, up to three times while
    room for more is made.

    Attributes:
        scores: Columns whose product is the score (the paper: complexity x quality).
        similarity: Highest cosine to a kept row (the paper: 0.9).
    """

    scores: tuple[str, ...] = ("complexity", "quality")
    similarity: float = 0.9

    def __post_init__(self) -> None:
        if not self.scores:
            raise ValueError("scores is empty: name one column or more")
        if not -1 <= self.similarity <= 1:
            raise ValueError(f"similarity is {self.similarity}: give a cosine, -1 to 1")

    def columns(self) -> dict[str, Any]:
        return {"embedding": pl.Array, **dict.fromkeys(self.scores, pl.Float64)}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        x = matrix(pool)
        values = np.prod([pool[name].to_numpy() for name in self.scores], axis=0)
        order = by_value(values)
        amounts = amounts_of(pool, budget)
        kept, lost_to, seen = _filter(x, order, amounts, budget.size, self.similarity)
        alike = pl.Series(lost_to >= 0)
        barred = pl.select(pl.when(alike).then(pl.lit("too_similar"))).to_series()
        spent = Spent(kept, int(amounts[kept].sum()), seen < len(order))
        free = lost_to < 0
        free[kept] = False
        facts = {"looked_at": int(seen), "too_similar": int((lost_to >= 0).sum())}
        ranked = np.concatenate([kept, order[free[order]]])
        return Ranking(ranked, spent, values, "below_cut", barred, lost_to, facts)


def _filter(
    x: np.ndarray, order: np.ndarray, amounts: np.ndarray, size: int, limit: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Keeps rows in order unless too similar to a kept one, until the budget is spent.

    Returns:
        Places kept, the place each row was too similar to (-1 for none), and how far it looked.
    """
    kept: list[int] = []
    vectors = np.empty((1024, x.shape[1]))
    lost_to = np.full(len(x), -1, dtype=np.int64)
    room, least = size, int(amounts.min())
    for start in range(0, len(order), BLOCK):
        places = order[start : start + BLOCK]
        block = on_grid(x[places])
        before = len(kept)
        nearest = np.full(len(places), -2.0)
        nearest_at = np.full(len(places), -1)
        if before:
            against = block @ vectors[:before].T * COSINE
            nearest_at, nearest = against.argmax(axis=1), against.max(axis=1)
        within = block @ block.T * COSINE
        mates: list[int] = []
        for i, place in enumerate(places.tolist()):
            if room < least:
                return np.array(kept, dtype=np.int64), lost_to, start + i
            if nearest[i] > limit:
                lost_to[place] = kept[nearest_at[i]]
                continue
            if mates:
                j = int(within[i, mates].argmax())
                if within[i, mates[j]] > limit:
                    lost_to[place] = places[mates[j]]
                    continue
            if amounts[place] > room:
                continue
            if len(kept) == len(vectors):
                vectors = np.concatenate([vectors, np.empty_like(vectors)])
            vectors[len(kept)] = block[i]
            kept.append(place)
            mates.append(i)
            room -= int(amounts[place])
    return np.array(kept, dtype=np.int64), lost_to, len(order)
