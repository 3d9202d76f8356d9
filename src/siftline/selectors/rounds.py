"""Iterative k-means quality sampling, without the training: weights of clusters over rounds.

Diversify and Conquer (Yu et al. 2024, arXiv 2409.11378): the budget is spent in rounds; after each,
a model is trained on what was chosen so far, its own answers are scored beside the given ones, and
clusters whose rows still teach it something gain weight. Training and scoring are the caller's;
here are the draw of a round and the update between two. Where the paper's update breaks, ours
differs: it multiplies by the clusters' mean differences, which may be negative, zero, or missing.
Here a weight is multiplied by the softmax of the mean differences, a cluster without scored rows
counts as an average one, and no cluster falls below a floor. Published: the last rounds hurt some
models (Llama-3-8B 61.2 to 59.6), so keep the one-round selection beside it.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import polars as pl

from siftline.kernels.draws import uniforms
from siftline.kernels.quotas import largest_remainder


@dataclass(frozen=True)
class Rounds:
    """A budget of rows spent in rounds over a fixed clustering.

    Attributes:
        size: Rows in all.
        rounds: How many (the paper: 3).
        temperature: Of the softmax, in standard deviations of the clusters' mean differences;
            higher moves weights less.
        floor: Least weight of a cluster, as a share of an even one.
        seed: Seed of the draws.
    """

    size: int
    rounds: int = 3
    temperature: float = 1.0
    floor: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= self.size:
            raise ValueError(f"rounds is {self.rounds}: give 1 to {self.size}, a row each at least")
        if not self.temperature > 0 or not 0 <= self.floor < 1:
            raise ValueError(
                f"temperature {self.temperature}, floor {self.floor}: give above 0, 0 to below 1"
            )

    def sizes(self) -> list[int]:
        """Rows drawn in each round; they sum to the size."""
        split: list[int] = largest_remainder(np.ones(self.rounds), self.size).tolist()
        return split

    def first_weights(self, clusters: int) -> np.ndarray:
        """Even weights, shape (clusters,)."""
        return np.full(clusters, 1 / clusters)

    def draw(
        self, members: pl.DataFrame, weights: np.ndarray, number: int, taken: Collection[str]
    ) -> pl.Series:
        """Draws the rows of a round from those not taken yet.

        Args:
            members: `id`, `cluster` (0 up), and `quality` (not negative) if rows are to be weighed.
            weights: Weight of each cluster, shape (clusters,).
            number: The round, from 0.
            taken: Ids of earlier rounds.

        Returns:
            Ids, sorted. What a cluster lacks goes to the others by weight.

        Raises:
            ValueError: if too few rows are left.
        """
        left = members.filter(~pl.col("id").is_in(list(taken))).sort("id")
        size = self.sizes()[number]
        if left.height < size:
            raise ValueError(
                f"round {number} draws {size} rows and {left.height} are left: lower the size"
            )
        labels = left["cluster"].to_numpy()
        quotas = largest_remainder(weights, size, np.bincount(labels, minlength=len(weights)))
        u = uniforms(self.seed, f"rounds/{number}", left["id"].to_list())
        keys = -np.log(-np.log(u))
        if "quality" in left.columns:
            quality = left["quality"].to_numpy()
            if not (np.isfinite(quality) & (quality >= 0)).all():
                raise ValueError("quality must be finite and not negative: it is a weight")
            with np.errstate(divide="ignore"):
                keys = keys + np.maximum(np.log(quality), -1e9)
        ranked = left.with_columns(
            key=pl.Series(keys), quota=pl.Series(quotas[labels], dtype=pl.Int64)
        ).sort("cluster", "key", "id", descending=[False, True, False])
        chosen = ranked.filter(pl.int_range(pl.len()).over("cluster") < pl.col("quota"))
        return chosen["id"].sort()

    def updated(self, weights: np.ndarray, scored: pl.DataFrame) -> np.ndarray:
        """Weights for the next round.

        Args:
            weights: Those of this round, shape (clusters,).
            scored: `cluster` and `difference` of trained rows: the score of the given answer less
                that of the model's own.

        Returns:
            Weights that sum to 1, shape (clusters,), none below floor / clusters.

        Raises:
            ValueError: if no row was scored, or a difference is not finite.
        """
        if scored.is_empty() or not scored["difference"].is_finite().fill_null(False).all():
            raise ValueError("score at least one row, and give finite differences")
        means = (
            scored.sort("cluster", "difference")
            .group_by("cluster")
            .agg(pl.col("difference").mean())
        )
        found = np.full(len(weights), np.nan)
        found[means["cluster"].to_numpy()] = means["difference"].to_numpy()
        known = found[np.isfinite(found)]
        spread = float(known.std())
        found = np.where(np.isfinite(found), found, known.mean())
        z = (found - known.mean()) / (spread * self.temperature) if spread > 0 else 0 * found
        fresh = weights * np.exp(z - z.max())
        fresh = fresh / fresh.sum()
        least = self.floor / len(weights)
        return _floored(fresh, least)


def _floored(weights: np.ndarray, least: float) -> np.ndarray:
    """Raises weights to a floor and scales the others, so that the sum stays 1."""
    low = np.zeros(len(weights), dtype=bool)
    while True:
        room = 1 - least * low.sum()
        others = weights[~low].sum()
        scaled: np.ndarray = np.where(low, least, weights * room / others if others else least)
        below = scaled < least * (1 - 1e-12)
        if not below.any():
            return scaled
        low |= below
