"""What a run of deduplication found, and how long its steps took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


@dataclass
class Clock:
    """Seconds by phase; phases of the same name add up."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of a block to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Deduplicated:
    """Which of n rows went, and for which; arrays of shape (n,).

    Attributes:
        matched: int64 row that row i was removed for, -1 where it is kept.
        similarity: float64, verified, to that row; 0 where it is kept.
        exact: bool, the two texts are the same bytes.
        pairs: Pairs whose similarity was computed.
        seconds: By phase.
        reason: Why rows went that are not exact.
    """

    matched: np.ndarray
    similarity: np.ndarray
    exact: np.ndarray
    pairs: int
    seconds: dict[str, float]
    reason: str = "near_duplicate"

    @property
    def kept(self) -> np.ndarray:
        """bool, shape (n,)."""
        return self.matched < 0

    @cached_property
    def cluster_size(self) -> np.ndarray:
        """int64, shape (n,): a kept row and those removed for it; of a removed row, 0."""
        gone = self.matched[~self.kept]
        size = np.bincount(gone, minlength=len(self.matched)) + 1
        return np.where(self.kept, size, 0)

    @cached_property
    def cluster(self) -> np.ndarray:
        """int64, shape (n,): number of the group of two or more rows that removals join, or -1."""
        gone = np.flatnonzero(~self.kept)
        targets = self.matched[gone]
        n = len(self.matched)
        if self.kept[targets].all():
            label = np.full(n, -1, np.int64)
            label[targets] = targets
            label[gone] = targets
            return label
        from scipy.sparse import coo_matrix  # only where all copies are dropped
        from scipy.sparse.csgraph import connected_components

        edges = coo_matrix((np.ones(len(gone), np.int8), (gone, targets)), shape=(n, n))
        label = connected_components(edges, directed=False)[1].astype(np.int64)
        return np.where(np.bincount(label)[label] > 1, label, -1)

    @property
    def clusters(self) -> int:
        """How many such groups there are."""
        return self.clusters_of(np.arange(len(self.matched)))

    def clusters_of(self, rows: np.ndarray) -> int:
        """How many of them some rows are in."""
        label = self.cluster[rows]
        return len(np.unique(label[label >= 0]))
