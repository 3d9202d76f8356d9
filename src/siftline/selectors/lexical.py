"""Selection by words: importance resampling (DSIR) and the nearest rows by BM25.

These two read text, in `summarise` alone, and keep hashed counts of its words, 8 bytes for each
distinct n-gram of a row. Words are runs of letters and digits, or of other signs, in lower case.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.kernels.draws import uniforms
from siftline.kernels.vectors.blocks import block_rows
from siftline.rows.selection import Selection
from siftline.selectors.method import (
    Plan,
    Ranking,
    amounts_of,
    applied,
    by_value,
    gathered,
    planned,
    target_rows,
)
from siftline.selectors.nearest import Turns, by_turns, takers, with_ids
from siftline.selectors.spending import Budget, spend

MAX_ROWS = 5_000_000
"""Rows whose counts are held at once: 12 GB at 300 distinct n-grams each, and while a method
decides about 54 GB (`Dsir`) or 68 GB (`NearestWords`)."""
WORDS = r"\w+|[^\w\s]+"


@dataclass(frozen=True)
class Counts:
    """Hashed n-gram counts of one bucket.

    Attributes:
        rows: `id`, and `n_tokens` if the bucket had it.
        grams: scipy CSR matrix of float32 counts, shape (rows, buckets).
    """

    rows: pl.DataFrame
    grams: Any


def count(texts: Sequence[str], buckets: int, longest: int) -> Any:
    """Counts of word 1..longest-grams hashed into buckets (murmur3), scipy CSR float32."""
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import HashingVectorizer

    if not texts:
        return csr_matrix((0, buckets), dtype=np.float32)
    hasher = HashingVectorizer(
        n_features=buckets,
        ngram_range=(1, longest),
        token_pattern=WORDS,
        alternate_sign=False,
        norm=None,
        dtype=np.float32,
    )
    return hasher.transform(texts)


def _counted(bucket: pl.DataFrame, buckets: int, longest: int) -> Counts:
    if "text" not in bucket.columns:
        raise ValueError("no column 'text': this method counts words, give the rows' text")
    missing = bucket.filter(pl.col("text").is_null())
    if not missing.is_empty():
        raise ValueError(f"{missing.height} rows have no text, first {missing['id'][0]}")
    names = [name for name in ("id", "n_tokens") if name in bucket.columns]
    rows = bucket.select(names).cast({"id": pl.String})
    return Counts(rows, count(bucket["text"].to_list(), buckets, longest))


def _gathered(states: Sequence[Counts]) -> tuple[pl.DataFrame, Any]:
    """Rows sorted by id, and their counts in that order."""
    from scipy.sparse import vstack

    filled = [state for state in states if state.rows.height] or list(states)
    pool = gathered([state.rows for state in filled], MAX_ROWS)
    ids = pl.concat([state.rows.select("id") for state in filled])["id"]
    return pool, vstack([state.grams for state in filled], format="csr")[ids.arg_sort().to_numpy()]


@dataclass(frozen=True)
class Dsir:
    """Data selection by importance resampling (Xie et al. 2023, arXiv 2302.03169).

    The log-weight of a row is the sum over its hashed n-grams of log p_target - log p_pool; rows
    are drawn by Gumbel top-k on it. Memory: about 36 bytes for each distinct n-gram of a row (8 as
    counted, gathered, in the order of ids, and in float64).

    Attributes:
        buckets: Hash buckets (the code: 10,000).
        grams: Longest n-gram (the code: 2).
        smoothing: Added to every probability (the code: 1e-8).
        scale: "sum" is the paper's, under which long rows decide by length; "mean" divides by the
            number of n-grams (siftline's option).
        seed: Seed of the draw.
    """

    buckets: int = 10_000
    grams: int = 2
    smoothing: float = 1e-8
    scale: Literal["sum", "mean"] = "sum"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.buckets < 2 or self.grams < 1 or not self.smoothing > 0:
            raise ValueError(
                f"buckets {self.buckets}, grams {self.grams}, smoothing {self.smoothing}: give at "
                "least 2, at least 1, and above 0"
            )
        if self.scale not in ("sum", "mean"):
            raise ValueError(f"scale is {self.scale!r}: use 'sum' or 'mean'")

    def summarise(self, bucket: pl.DataFrame) -> Counts:
        return _counted(bucket, self.buckets, self.grams)

    def decide(
        self, states: Sequence[Counts], budget: Budget, target: pl.DataFrame | None = None
    ) -> Plan:
        pool, grams = _gathered(states)
        wanted = count(target_rows(target, "text")["text"].to_list(), self.buckets, self.grams)
        ratio = self._log(wanted) - self._log(grams)
        weights = grams.astype(np.float64) @ ratio
        if self.scale == "mean":
            weights = weights / np.maximum(np.asarray(grams.sum(axis=1)).ravel(), 1)
        u = uniforms(self.seed, "dsir", pool["id"].to_list())
        order = by_value(weights - np.log(-np.log(u)))
        spent = spend(order, amounts_of(pool, budget), budget)
        facts = {"target_rows": wanted.shape[0], "grams": int(grams.sum())}
        return planned(pool, Ranking(order, spent, weights, "not_drawn", facts=facts), budget)

    def apply(self, bucket: pl.DataFrame, plan: Plan) -> Selection:
        return applied(bucket["id"], plan)

    def _log(self, grams: Any) -> np.ndarray:
        """Log of the smoothed share of each bucket, float64 (buckets,)."""
        totals = np.asarray(grams.sum(axis=0, dtype=np.float64)).ravel()
        found: np.ndarray = np.log(totals / max(totals.sum(), 1.0) + self.smoothing)
        return found


SATURATION, LENGTH = 1.2, 0.75
"""BM25's k1 and b as search engines have them (Lucene's defaults)."""
WORD_BUCKETS = 1 << 18
"""Hash buckets of words."""


@dataclass(frozen=True)
class NearestWords:
    """The nearest rows to target rows by BM25 (Robertson & Zaragoza 2009), by turns.

    What a search engine would give: the baseline for methods that embed. Turns are those of RDS+.
    Memory: about 45 bytes for each distinct word of a row, lists of 80 bytes a row as `rds_plus`
    has them, and 60 MiB a core for blocks of scores.

    Attributes:
        turns: "query" or "task"; see `rds_plus`.
    """

    turns: Turns = "query"

    def __post_init__(self) -> None:
        if self.turns not in ("query", "task"):
            raise ValueError(f"turns is {self.turns!r}: use 'query' or 'task'")

    def summarise(self, bucket: pl.DataFrame) -> Counts:
        return _counted(bucket, WORD_BUCKETS, 1)

    def decide(
        self, states: Sequence[Counts], budget: Budget, target: pl.DataFrame | None = None
    ) -> Plan:
        pool, grams = _gathered(states)
        rows, names = takers(target, self.turns, "text")
        queries = count(rows["text"].to_list(), WORD_BUCKETS, 1)
        weighted = bm25(grams, SATURATION, LENGTH)
        asked = queries.sign().T.tocsc()

        def score(start: int, stop: int) -> np.ndarray:
            found: np.ndarray = (weighted[start:stop] @ asked).toarray()
            return found

        amounts = amounts_of(pool, budget)
        found = by_turns(score, block_rows(len(names)), names, amounts, budget)
        return planned(pool, with_ids(found, pool), budget)

    def apply(self, bucket: pl.DataFrame, plan: Plan) -> Selection:
        return applied(bucket["id"], plan)


def bm25(grams: Any, k1: float, b: float) -> Any:
    """Counts turned into BM25 weights: log(1 + (n - df + .5) / (df + .5)) times saturation.

    Args:
        grams: scipy CSR counts, shape (n, words).
        k1: Saturation.
        b: Correction for length.

    Returns:
        scipy CSR float32 of the same shape: a query's score is the sum over its distinct words.
    """
    lengths = np.asarray(grams.sum(axis=1, dtype=np.float64)).ravel()
    n = grams.shape[0]
    seen = np.bincount(grams.indices, minlength=grams.shape[1])
    rarity = np.log1p((n - seen + 0.5) / (seen + 0.5))
    norm = k1 * (1 - b + b * lengths / max(float(lengths.mean()), 1e-12))
    out = grams.copy()
    counts = out.data.astype(np.float64)
    spread = np.repeat(norm, np.diff(out.indptr))
    out.data = (rarity[out.indices] * counts * (k1 + 1) / (counts + spread)).astype(np.float32)
    return out
