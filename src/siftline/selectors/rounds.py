"""Iterative k-means quality sampling: weights of clusters that follow what a model has learnt.

Diversify and Conquer (Yu et al. 2024, arXiv 2409.11378): the budget is spent in rounds; after each,
a model is trained on what was chosen so far, its own answers are scored beside the given ones, and
clusters whose rows still teach it something gain weight. Training and scoring are the caller's, a
function of the round and of the ids chosen so far; here are the draw of a round and the update
between two. Where the paper's update breaks, ours differs: it multiplies by the clusters' mean
differences, which may be negative, zero, or missing. Here a weight is multiplied by the softmax of
the mean differences, a cluster without scored rows counts as an average one, and no cluster falls
below a floor. Published: the last rounds hurt some models (Llama-3-8B 61.2 to 59.6), so keep the
one-round selection beside it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.kernels.draws import largest_remainder, uniforms
from siftline.selectors.kmeans_quality import KmeansQuality
from siftline.selectors.method import Plan, Ranking, amounts_of, gathered, matrix, planned
from siftline.selectors.spending import Budget, Spent, spend_by_group

PERPLEXITY = "perplexity"
RECIPES_ONLY = (
    "kmeans_quality_rounds trains between its rounds: give it to a recipe, as the stage select: "
    "{method: kmeans_quality_rounds}; kmeans_quality is the same without rounds"
)
Teach = Callable[[int, list[str]], pl.DataFrame]
"""Trains on the rows of some ids after a round (from 0) and scores them: `id` and `difference`,
the score of the given answer less that of the model's own. Rows may be missing."""


@dataclass(frozen=True)
class Rounds:
    """A budget spent in rounds over a fixed clustering.

    Attributes:
        size: Rows, or loss tokens, in all.
        rounds: How many (the paper: 3).
        temperature: Of the softmax, in standard deviations of the clusters' mean differences;
            higher moves weights less.
        floor: Least weight of a cluster, as a share of an even one.
        seed: Seed of the draws.
        unit: What the size counts.
    """

    size: int
    rounds: int = 3
    temperature: float = 1.0
    floor: float = 0.1
    seed: int = 0
    unit: Literal["rows", "loss_tokens"] = "rows"

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= self.size:
            raise ValueError(f"rounds is {self.rounds}: give 1 to {self.size}, a row each at least")
        if not self.temperature > 0 or not 0 <= self.floor < 1:
            raise ValueError(
                f"temperature {self.temperature}, floor {self.floor}: give above 0, 0 to below 1"
            )

    def sizes(self) -> list[int]:
        """What each round may spend; they sum to the size."""
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
            members: `id`, `cluster` (0 up), `quality` (not negative) if rows are to be weighed,
                and `amount`, the loss tokens of each, if those are counted.
            weights: Weight of each cluster, shape (clusters,).
            number: The round, from 0.
            taken: Ids of earlier rounds. Tokens they left over are spent now.

        Returns:
            Ids, sorted. What a cluster lacks goes to the others by weight.

        Raises:
            ValueError: if too few rows are left.
        """
        was_taken = pl.col("id").is_in(list(taken))
        left = members.filter(~was_taken).sort("id")
        size = self.sizes()[number]
        amounts = np.ones(left.height, dtype=np.int64)
        if self.unit == "loss_tokens":
            spent = int(members.filter(was_taken)["amount"].sum())
            size = sum(self.sizes()[: number + 1]) - spent
            amounts = left["amount"].to_numpy()
        elif left.height < size:
            raise ValueError(
                f"round {number} draws {size} rows and {left.height} are left: lower the size"
            )
        if size < 1 or not left.height:
            return left["id"][:0]
        u = uniforms(self.seed, f"rounds/{number}", left["id"].to_list())
        keys = -np.log(-np.log(u))
        if "quality" in left.columns:
            quality = left["quality"].to_numpy()
            if not (np.isfinite(quality) & (quality >= 0)).all():
                raise ValueError("quality must be finite and not negative: it is a weight")
            with np.errstate(divide="ignore"):
                keys = keys + np.maximum(np.log(quality), -1e9)
        labels = left["cluster"].to_numpy()
        budget = Budget(size, self.unit, "smaller")
        got = spend_by_group(labels, keys, weights, amounts, budget)
        return left["id"].gather(got.spent.rows).sort()

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


@dataclass(frozen=True)
class KmeansRounds(KmeansQuality):
    """Clusters, and rounds of choosing, training and weighing; only in a recipe, which trains.

    Memory: as `kmeans_quality`, whose embeddings are held while the models of the rounds train, and
    the ids of the rows chosen so far.

    Attributes:
        clusters: As in `kmeans_quality`.
        candidates: As in `kmeans_quality`.
        quota: Weights of the first round: "equal" (the paper) or "proportional" to cluster sizes.
        quality: Column of weights of the draw inside a cluster; None draws evenly.
        seed: Seed of the clustering, the draws, the trainings and what the models answer.
        rounds: How many (the paper: 3). One less is followed by a training, if it drew a row.
        compare: How given answers and the model's own are scored: "perplexity" under the model
            just trained (log PPL(given) - log PPL(own)), or the name of a quality scorer of the
            recipe. The paper's best is a reward model (47.0; perplexity 44.9).
        temperature: Of the softmax that moves the weights, in standard deviations.
        floor: Least weight of a cluster, as a share of an even one.
        max_new_tokens: Of an answer (the released code: 512); at most half the model's length.
    """

    quota: Literal["proportional", "equal"] = "equal"
    rounds: int = 3
    compare: str = PERPLEXITY
    temperature: float = 1.0
    floor: float = 0.1
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        Rounds(max(self.rounds, 1), self.rounds, self.temperature, self.floor)

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        raise ValueError(RECIPES_ONLY)

    def refine(self, states: Sequence[pl.DataFrame], budget: Budget, teach: Teach) -> Plan:
        """`decide` for a caller that can train.

        Args:
            states: What `summarise` gave.
            budget: The budget.
            teach: Called after every round that drew a row, but the last.

        Raises:
            ValueError: as `decide`, or if the budget has less than a row for each round.
        """
        pool = gathered(states, self.MAX)
        return planned(pool, self._ranking(pool, budget, teach), budget)

    def _ranking(self, pool: pl.DataFrame, budget: Budget, teach: Teach) -> Ranking:
        ids, amounts = pool["id"], amounts_of(pool, budget)
        if int(amounts.sum()) <= budget.size:  # nothing to choose, so nothing to train for
            everything = np.arange(pool.height)
            spent = Spent(everything, int(amounts.sum()), True)
            return Ranking(everything, spent, np.ones(pool.height), facts={"rounds": []})
        found, tried = self._clusters(matrix(pool), ids.to_list())
        members = pl.DataFrame({"id": ids, "cluster": found.labels, "amount": amounts})
        if self.quality is not None:
            self._log_weights(pool)  # refuses negative ones
            members = members.with_columns(pool[self.quality].alias("quality"))
        course = self._course(members, budget, teach)
        round_of = dict(zip(course.taken, course.numbers, strict=True))
        numbers = np.array([round_of.get(i, 0) for i in ids.to_list()])
        order = np.lexsort((np.arange(pool.height), numbers))[pool.height - len(round_of) :]
        spent = Spent(order, int(amounts[order].sum()), True)
        tables = {
            "members": members.select("id", "cluster").with_columns(
                round=pl.Series(numbers).replace(0, None)
            ),
            "rounds": pl.concat(course.tables),
        }
        facts = {"clusters": len(found.centroids), "silhouettes": tried, "rounds": course.facts}
        values = np.where(numbers > 0, numbers, np.nan)
        # What is left of a budget in tokens buys no row: that is no shortfall.
        stopped = budget.unit != "rows"
        return Ranking(
            order, spent, values, "not_drawn", facts=facts, tables=tables, stopped=stopped
        )

    def _course(self, members: pl.DataFrame, budget: Budget, teach: Teach) -> "Course":
        plan = Rounds(
            budget.size, self.rounds, self.temperature, self.floor, self.seed, budget.unit
        )
        counts = np.bincount(members["cluster"].to_numpy())
        weights = plan.first_weights(len(counts))
        if self.quota == "proportional":
            weights = counts / counts.sum()
        course = Course()
        for number in range(self.rounds):
            drawn = plan.draw(members, weights, number, course.taken).to_list()
            course.taken += drawn
            course.numbers += [number + 1] * len(drawn)
            scored = None
            if drawn and number + 1 < self.rounds:  # else there is nothing new to learn
                told = teach(number, sorted(course.taken))
                scored = told.join(members.select("id", "cluster"), on="id", validate="1:1")
            course.note(members, drawn, weights, scored)
            if scored is not None:
                weights = plan.updated(weights, scored)
        return course


@dataclass
class Course:
    """What the rounds did so far."""

    taken: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    tables: list[pl.DataFrame] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)

    def note(
        self,
        members: pl.DataFrame,
        drawn: list[str],
        weights: np.ndarray,
        scored: pl.DataFrame | None,
    ) -> None:
        """Adds a round: lines of the table by cluster, and facts of the whole."""
        number = len(self.facts) + 1
        picked = members.filter(pl.col("id").is_in(drawn))
        table = pl.DataFrame({"cluster": np.arange(len(weights)), "weight": weights})
        table = table.with_columns(
            round=pl.lit(number, pl.Int64),
            picked=np.bincount(picked["cluster"].to_numpy(), minlength=len(weights)),
        )
        empty = pl.DataFrame(
            schema={"cluster": members.schema["cluster"], "difference": pl.Float64}
        )
        by_cluster = (
            (empty if scored is None else scored.sort("cluster", "difference"))
            .group_by("cluster")
            .agg(pl.len().alias("scored"), pl.col("difference").mean())
            .with_columns(pl.col("cluster").cast(pl.Int64))
        )
        table = table.join(by_cluster, on="cluster", how="left").sort("cluster")
        self.tables.append(
            table.select(
                "round", "cluster", "weight", "picked",
                pl.col("scored").cast(pl.Int64).fill_null(0), "difference",
            )
        )  # fmt: skip
        fact = {
            "round": number,
            "picked": len(drawn),
            "spent": int(picked["amount"].sum()),
            "lowest_weight": float(weights.min()),
            "highest_weight": float(weights.max()),
        }
        if scored is not None:
            fact |= {
                "scored": scored.height,
                "mean_difference": float(np.sort(scored["difference"].to_numpy()).mean()),
            }
        self.facts.append(fact)
