"""RDS+: rows whose representation is nearest to some target row, by turns.

Ivison et al. 2025, arXiv 2503.01807. The embedding is the model's own: the position-weighted mean
of the last hidden states over the whole conversation, templated with its roles, as far as the
model's length goes. Any other embedder works too and is another method in their tables; one that
knows no template reads each turn behind the name of its role.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import polars as pl

from siftline.kernels.vectors.blocks import cosine_blocks
from siftline.selectors.method import Ranked, Ranking, amounts_of
from siftline.selectors.nearest import Turns, by_turns, takers, with_ids
from siftline.selectors.spending import Budget
from siftline.selectors.vectors import both


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
