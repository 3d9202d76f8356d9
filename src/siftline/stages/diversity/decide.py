"""The diversity shortlist: prompts clustered by meaning, drawn by cluster quota.

kMQ (Yu et al. 2024, arXiv 2409.11378): k-means, a quota per cluster, a weighted draw inside it.
Two departures, both where paper and released code disagree: the draw is without replacement, and
what a small cluster cannot use goes to the others, so the size asked for is the size returned.
It chooses prompts, not rows; `expand` carries the choice over to the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.kernels.draws import gumbel_top_k, largest_remainder, uniforms
from siftline.kernels.vectors.kmeans import (
    SILHOUETTE_SAMPLE,
    default_clusters,
    kmeans,
    project_2d,
    silhouette,
)
from siftline.rows.selection import Selection, decisions

MAX_VALUES = 4_000_000_000
"""Embedding values (prompts x dimensions) clustered at once: 16 GB at float32."""


@dataclass(frozen=True)
class Diversity:
    """Draws prompts by cluster quota. Clustering is global: all prompts are held in memory.

    Buckets hold `prompt_id`, `embedding` (pl.Array of float16 or float32) and, if named, a weight.

    Attributes:
        size: Prompts to keep (see `shortlist_size`); None keeps all and only makes the clusters.
        clusters: How many; None means round(sqrt(n / 2)) (Mardia et al. 1979). kMQ found 64 best
            for 52k prompts, 2048 for 196k: the rule gives 161 and 313.
        quota: "proportional" to the prompts of a cluster (kMQ, the paper) or "equal" (its code).
        weight: Column of weights for the draw inside a cluster; "uniform" uses none.
        seed: The recipe's seed.
    """

    size: int | None = None
    clusters: int | None = None
    quota: Literal["proportional", "equal"] = "proportional"
    weight: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size is {self.size}: keep at least 1 prompt, or null for all")
        if self.clusters is not None and self.clusters < 1:
            raise ValueError(f"clusters is {self.clusters}: give 1 or more, or null for the rule")
        if self.quota not in ("proportional", "equal"):
            raise ValueError(f"quota is {self.quota!r}: use 'proportional' or 'equal'")

    def summarise(self, bucket: pl.DataFrame) -> pl.DataFrame:
        """Prompt ids, embeddings and weights of one bucket: clustering needs all of them."""
        weighted = self.weight != "uniform"
        if weighted and self.weight not in bucket.columns:
            raise ValueError(f"no weight column {self.weight!r}: name a score column or 'uniform'")
        weight = pl.col(self.weight).cast(pl.Float64) if weighted else pl.lit(1.0)
        return bucket.select("prompt_id", "embedding", weight.alias("weight"))

    def decide(self, states: Sequence[pl.DataFrame]) -> "Plan":
        """Clusters all prompts, splits the size over the clusters and draws."""
        prompts = pl.concat(list(states)).sort("prompt_id")
        n = prompts.height
        if n == 0:
            none = pl.DataFrame(schema=_PLAN)
            return Plan(none, pl.DataFrame(schema=_QUOTAS), {"prompts": 0, "clusters": 0}, True)
        _check(prompts, self.weight)
        ids = prompts["prompt_id"].to_list()
        x = prompts["embedding"].to_numpy()
        found = kmeans(x, self.clusters or default_clusters(n), self.seed, ids)
        size = n if self.size is None else min(self.size, n)
        ranks, quotas = draw(
            ids, found.labels, prompts["weight"].to_numpy(), size, self.quota, self.seed
        )
        points = project_2d(x, ids)
        frame = pl.DataFrame(
            {
                "prompt_id": ids,
                "cluster": found.labels,
                "x": points[:, 0],
                "y": points[:, 1],
                "rank": ranks,
                "quota": quotas[found.labels],
            },
            schema=_PLAN,
        )
        score = silhouette(x, found.labels, SILHOUETTE_SAMPLE, self.seed, ids)
        facts = {
            "prompts": n,
            "size": size,
            "clusters": len(found.centroids),
            "silhouette": None if score is None else round(score, 4),
            "clustering": found.facts(),
        }
        table = pl.DataFrame(
            {
                "cluster": np.arange(len(quotas)),
                "prompts": np.bincount(found.labels),
                "quota": quotas,
            },
            schema=_QUOTAS,
        )
        return Plan(frame, table, facts, size >= n)

    def apply(self, bucket: pl.DataFrame, plan: "Plan") -> Selection:
        """Decides prompts: value is the rank drawn in the cluster, threshold its quota."""
        drawn = bucket.select("prompt_id").join(plan.prompts, on="prompt_id", how="left")
        assert drawn["cluster"].null_count() == 0, "a prompt that was not summarised"
        drawn = drawn.sort("prompt_id")
        decided = decisions(
            drawn["prompt_id"],
            kept=drawn["rank"] <= drawn["quota"],
            reason=["not_shortlisted"] * drawn.height,
            value=drawn["rank"].cast(pl.Float64),
            threshold=drawn["quota"].cast(pl.Float64),
        )
        clusters = drawn.select("prompt_id", "cluster", "x", "y")
        tables = {"clusters": clusters, "quotas": plan.quotas}
        return Selection(decided, plan.facts, tables, plan.vacuous)


_PLAN = {
    "prompt_id": pl.String,
    "cluster": pl.Int32,
    "x": pl.Float32,
    "y": pl.Float32,
    "rank": pl.Int64,
    "quota": pl.Int64,
}
_QUOTAS = {"cluster": pl.Int32, "prompts": pl.Int64, "quota": pl.Int64}


@dataclass(frozen=True)
class Plan:
    """What `decide` found: one line per prompt (map, rank, quota), one per cluster, facts."""

    prompts: pl.DataFrame
    quotas: pl.DataFrame
    facts: dict[str, Any]
    vacuous: bool


def draw(
    ids: Sequence[str],
    labels: np.ndarray,
    weights: np.ndarray,
    size: int,
    quota: Literal["proportional", "equal"],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Splits a size over given clusters and ranks the prompts of each by a weighted draw.

    Args:
        ids: n prompt ids.
        labels: Cluster 0..k-1 per prompt, shape (n,).
        weights: Non-negative weight per prompt, shape (n,); weight 0 is drawn last.
        size: Prompts to keep, at most n.
        quota: See `Diversity`.
        seed: The recipe's seed.

    Returns:
        Rank drawn inside the cluster (int64 from 1, shape (n,)) and the quotas (int64, shape
        (k,)); kept are the prompts whose rank is within their cluster's quota, `size` in all.
    """
    counts = np.bincount(labels)
    shares = counts.astype(np.float64) if quota == "proportional" else np.ones(len(counts))
    quotas = largest_remainder(shares, size, counts)
    u = uniforms(seed, "diversity", ids)
    names = np.asarray(ids)
    ranks = np.zeros(len(ids), dtype=np.int64)
    by_cluster = np.argsort(labels, kind="stable")
    for members in np.split(by_cluster, np.cumsum(counts)[:-1]):
        own = names[members]
        best = gumbel_top_k(u[members], own, len(members), weights[members])  # type: ignore[arg-type]
        ranks[members[best]] = np.arange(1, len(members) + 1)
    return ranks, quotas


def _check(prompts: pl.DataFrame, weight: str) -> None:
    """Refuses what would cluster wrongly or not fit."""
    dtype = prompts.schema["embedding"]
    if not isinstance(dtype, pl.Array):
        raise ValueError(f"embedding is {dtype}: store fixed-size lists (pl.Array)")
    values = prompts.height * dtype.shape[0]
    if values > MAX_VALUES:
        raise ValueError(
            f"{prompts.height} prompts x {dtype.shape[0]} dimensions is over {MAX_VALUES} values: "
            "shortlist a part of the pool, or embed with fewer dimensions"
        )
    for column, name in (("embedding", "embedding"), ("weight", weight)):
        missing = prompts.filter(pl.col(column).is_null())
        if not missing.is_empty():
            raise ValueError(
                f"{missing.height} prompts have no {name}, first {missing['prompt_id'][0]}: "
                "score them or leave failed prompts out"
            )


def expand(selection: Selection, rows: pl.DataFrame) -> Selection:
    """Carries a selection over prompts to the rows (`id`, `prompt_id`) that answer them.

    Raises:
        ValueError: if a row's prompt was not decided.
    """
    by_prompt = selection.decisions.rename({"id": "prompt_id"})
    joined = rows.select("id", "prompt_id").join(by_prompt, on="prompt_id", how="left")
    lost = joined.filter(pl.col("kept").is_null())
    if not lost.is_empty():
        raise ValueError(
            f"{lost.height} rows have a prompt that was not decided, first {lost['prompt_id'][0]}: "
            "embed every prompt of the bucket"
        )
    decided = decisions(
        joined["id"],
        kept=joined["kept"],
        reason=joined["reason"],
        value=joined["value"],
        threshold=joined["threshold"],
    )
    return Selection(decided, selection.facts, selection.tables, selection.vacuous)


def shortlist_size(budget_rows: int, oversampling: float, keep_rate: float) -> int:
    """Prompts to shortlist so that the later gates leave about `oversampling` budgets of rows.

    Args:
        budget_rows: Rows the budget buys.
        oversampling: Rows wanted after the gates per row of the budget, at least 1.
        keep_rate: Rows a shortlisted prompt yielded in the pilot after all gates, above 0.

    Returns:
        ceil(budget_rows x oversampling / keep_rate).

    Raises:
        ValueError: if an argument is out of range.
    """
    if budget_rows < 1 or not 1 <= oversampling < np.inf or not keep_rate > 0:
        raise ValueError(
            f"budget of {budget_rows} rows, oversampling {oversampling}, keep rate {keep_rate}: "
            "they must be at least 1, at least 1 (and finite) and above 0"
        )
    return int(np.ceil(np.round(budget_rows * oversampling / keep_rate, 6)))


@dataclass(frozen=True)
class Shortlist:
    """The diversity stage: which prompts are worth model calls.

    Attributes:
        size: Prompts to keep; null means budget x oversampling / keep_rate.
        oversampling: Rows wanted after all gates per row of the budget.
        keep_rate: Rows a shortlisted prompt is expected to yield after all gates. The allocate
            stage of a run reports the measured one (`yield_per_prompt`).
        clusters: Number of clusters; null means round(sqrt(n / 2)) for n prompts.
        quota: Prompts of a cluster: "proportional" to its size (kMQ), or "equal".
        weight: Weight of a prompt in the draw: "uniform", or one of the recipe's scorers.
        seed: The recipe's seed.
    """

    size: int | None = None
    oversampling: float = 3.0
    keep_rate: float = 1.0
    clusters: int | None = None
    quota: Literal["proportional", "equal"] = "proportional"
    weight: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        self.diversity(1, 1)

    def diversity(self, budget_rows: int, prompts: int) -> Diversity:
        """The selector for a budget and a number of prompts in play."""
        size = self.size
        if size is None:
            size = shortlist_size(budget_rows, self.oversampling, self.keep_rate)
        clusters = None if self.clusters is None else min(self.clusters, prompts)
        return Diversity(min(size, prompts), clusters, self.quota, self.weight, self.seed)
