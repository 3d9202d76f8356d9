"""k-means quality sampling (kMQ): a budget per cluster of meaning, a draw by quality inside it.

Diversify and Conquer (Yu et al. 2024, arXiv 2409.11378). Quotas are proportional to cluster size,
by largest remainder, and what a small cluster can't use goes to the others. The draw is without
replacement, where the paper's is with; the released code gives equal quotas and loses what small
clusters can't use. The clustering is the best of several starts, run until it stands still (the
code: the best of five, 300 iterations). Large k makes clusters of noise that quotas then include:
the paper's score falls from 47.7 at k = 2048 to 43.0 at 8192.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.kernels.draws import uniforms
from siftline.kernels.vectors.kmeans import (
    SILHOUETTE_SAMPLE,
    Clusters,
    default_clusters,
    kmeans,
    silhouette,
)
from siftline.selectors.method import Ranked, Ranking, amounts_of, matrix
from siftline.selectors.spending import Budget, spend_by_group


@dataclass(frozen=True)
class KmeansQuality(Ranked):
    """Cluster, split the budget, draw by quality.

    Memory: the pool's embeddings twice, and once more in float32 while they are clustered: 8 bytes
    a value at float16, 10 for a moment.

    Attributes:
        clusters: How many; None means round(sqrt(n / 2)) (Mardia et al. 1979), or the best of
            `candidates`. The paper found 64 best for 52k rows and 2048 for 196k.
        candidates: Numbers of clusters to try, the best by silhouette taken (the paper's rule);
            each costs a clustering.
        quota: "proportional" to the rows of a cluster (the paper) or "equal" (its code).
        quality: Column of weights of the draw, not negative; None draws evenly (kM-Random).
        seed: Seed of the clustering and the draw.
    """

    clusters: int | None = None
    candidates: tuple[int, ...] = ()
    quota: Literal["proportional", "equal"] = "proportional"
    quality: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clusters is not None and self.candidates:
            raise ValueError("clusters and candidates exclude each other: give one of them")
        if min((self.clusters or 1, *self.candidates)) < 1:
            raise ValueError("clusters and candidates must be 1 or more")
        if self.quota not in ("proportional", "equal"):
            raise ValueError(f"quota is {self.quota!r}: use 'proportional' or 'equal'")

    def columns(self) -> dict[str, Any]:
        quality = {} if self.quality is None else {self.quality: pl.Float64}
        return {"embedding": pl.Array, **quality}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        ids = pool["id"].to_list()
        found, tried = self._clusters(matrix(pool), ids)
        u = uniforms(self.seed, "kmeans_quality", ids)
        keys = -np.log(-np.log(u)) + self._log_weights(pool)
        counts = np.bincount(found.labels)
        shares = counts.astype(np.float64) if self.quota == "proportional" else np.ones(len(counts))
        got = spend_by_group(found.labels, keys, shares, amounts_of(pool, budget), budget)
        table = pl.DataFrame(
            {
                "cluster": np.arange(len(counts)),
                "rows": counts,
                "quota": got.quotas,
                "kept": np.bincount(found.labels[got.spent.rows], minlength=len(counts)),
            }
        )
        tables = {"clusters": table}
        tables["members"] = pl.DataFrame({"id": ids, "cluster": found.labels})
        facts = {"clusters": len(counts), "silhouettes": tried, "clustering": found.facts()}
        values = got.ranks.astype(np.float64)
        return Ranking(got.order, got.spent, values, "not_drawn", facts=facts, tables=tables)

    def _clusters(
        self, x: np.ndarray, ids: Sequence[str]
    ) -> tuple[Clusters, dict[str, float | None]]:
        """The clustering, and the silhouette of every number of clusters tried."""
        if not self.candidates:
            k = self.clusters or default_clusters(len(ids))
            return kmeans(x, min(k, len(ids)), self.seed, ids), {}
        best, tried = None, {}
        for k in sorted(set(self.candidates)):
            found = kmeans(x, min(k, len(ids)), self.seed, ids)
            score = silhouette(x, found.labels, SILHOUETTE_SAMPLE, self.seed, ids)
            tried[str(k)] = None if score is None else round(score, 4)
            if best is None or (score is not None and score > best[0]):
                best = (-2.0 if score is None else score, found)
        assert best is not None
        return best[1], tried

    def _log_weights(self, pool: pl.DataFrame) -> np.ndarray:
        if self.quality is None:
            return np.zeros(pool.height)
        weights = pool[self.quality].to_numpy()
        if (weights < 0).any():
            raise ValueError(
                f"{int((weights < 0).sum())} rows have a negative {self.quality}, first "
                f"{pool['id'][int(np.argmax(weights < 0))]}: shift it above 0, it is a weight"
            )
        with np.errstate(divide="ignore"):
            return np.maximum(np.log(weights), -1e9)  # a weight of 0 is drawn last, yet ordered
