"""LESS: rows whose gradient points where the target's gradients point.

Xia et al. 2024, arXiv 2402.04333. A row is worth what one step on it would lower the loss on the
target, to first order: the inner product of the target's gradient and the row's update. How the
vectors are made is `Gradients` and `siftline.training.gradients`; here they are embeddings of unit
length, several checkpoints side by side, each scaled by the root of its share of the learning rate,
so that one cosine is the paper's weighted sum of cosines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.kernels.vectors.blocks import block_rows, cosine_blocks, over_blocks
from siftline.selectors.method import Plan, Ranked, Ranking, amounts_of, both, by_value, target_rows
from siftline.selectors.nearest import TASK
from siftline.selectors.spending import Budget, spend


@dataclass(frozen=True)
class Gradients:
    """How gradient features are made. Defaults are the paper's unless another source is named.

    Attributes:
        dimensions: Width of the projection of each checkpoint. The noise of a cosine is about
            1 / sqrt(dimensions): 0.011 at 8192, 0.031 at 1024.
        share: Share of the rows that the adapter is warmed up on, drawn by hash; 0 takes the
            gradients of a fresh adapter, where otherwise a row of the pool counts by its Adam
            update.
        epochs: Passes of the warm-up, and so checkpoints.
        rank: Rank of the adapter, on all linear layers but the head, alpha twice as large
            (`FineTune`'s default; the paper: 128 on the attention's).
        learning_rate: Peak rate of the warm-up.
        batch_rows: Rows of an optimizer step of the warm-up (the paper: 128 of 13,500 rows; here
            the share is often a few hundred).
    """

    dimensions: int = 8192
    share: float = 0.05
    epochs: int = 4
    rank: int = 16
    learning_rate: float = 2e-5
    batch_rows: int = 16

    def __post_init__(self) -> None:
        for name in ("dimensions", "epochs", "rank", "batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}: it must lie in [0, 1]")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: it must be above 0")


@dataclass(frozen=True)
class Less(Ranked):
    """The highest mean cosine to the gradients of a task, the best task deciding.

    Global: it holds the features, 2 bytes a value; similarities in blocks. Where the caller reads
    them part by part and has them scored, it holds one part, and about 100 bytes a row.

    Attributes:
        tasks: What a task is: "source" takes the target's sources, rows without one being a task
            too; "all" makes the whole target one.
    """

    tasks: Literal["source", "all"] = "source"

    def __post_init__(self) -> None:
        if self.tasks not in ("source", "all"):
            raise ValueError(f"tasks is {self.tasks!r}: use 'source' or 'all'")

    def columns(self) -> dict[str, Any]:
        return {"embedding": pl.Array}

    def score(self, bucket: pl.DataFrame, target: pl.DataFrame | None) -> pl.DataFrame:
        """What `decide` needs of a bucket, without its vectors.

        Args:
            bucket: As for `summarise`.
            target: As for `decide`.

        Returns:
            `id`, `n_tokens` if there, `value`, the mean cosine to the best task, and `task`, its
            place among the sorted ones.

        Raises:
            ValueError: as `summarise` and `both`.
        """
        pool = self.summarise(bucket)
        both(pool, target)  # checks both before anything is computed
        rows, names = self._by_task(target_rows(target, "embedding"))
        first = np.unique(names, return_index=True)[1]
        counts = np.diff([*first, len(names)])
        x, y = pool["embedding"].to_numpy(), rows["embedding"].to_numpy()
        score = cosine_blocks(x, y)[0]
        block = block_rows(max(y.shape))  # features may be wider than the target is long
        values = np.empty(pool.height)
        best = np.empty(pool.height, dtype=np.int32)

        def of_tasks(start: int, stop: int) -> np.ndarray:
            found = score(start, stop).astype(np.float64)
            means: np.ndarray = np.add.reduceat(found, first, axis=1) / counts
            return means

        for start, stop, means in over_blocks(pool.height, block, of_tasks):
            best[start:stop] = means.argmax(axis=1)
            values[start:stop] = means.max(axis=1)
        return pool.drop("embedding").with_columns(
            pl.Series("value", values), pl.Series("task", best)
        )

    def decide(
        self, states: Sequence[pl.DataFrame], budget: Budget, target: pl.DataFrame | None = None
    ) -> Plan:
        """As every method; a state is what `summarise` gave, or `score`."""
        scored = [s if "value" in s.columns else self.score(s, target) for s in states if s.height]
        return super().decide(scored or states, budget, target)

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        names = self._by_task(target_rows(target, "embedding"))[1]
        tasks = np.unique(names)
        values = pool["value"].to_numpy()
        order = by_value(values)
        spent = spend(order, amounts_of(pool, budget), budget)
        taken = spent.rows
        table = pl.DataFrame(
            {
                "id": pool["id"].gather(taken),
                "task": pl.Series(tasks[pool["task"].to_numpy()[taken]], dtype=pl.String),
                "score": values[taken],
            }
        )
        facts = {"tasks": len(tasks), "target_rows": len(names)}
        return Ranking(order, spent, values, "below_cut", facts=facts, tables={"picks": table})

    def _by_task(self, rows: pl.DataFrame) -> tuple[pl.DataFrame, np.ndarray]:
        """Target rows in the order of their tasks, and the task of each."""
        named = pl.lit("")
        if self.tasks == "source" and TASK in rows.columns:
            named = pl.col(TASK).fill_null("")
        rows = rows.with_columns(named.cast(pl.String).alias("task")).sort("task", "id")
        return rows, rows["task"].to_numpy().astype(str)
