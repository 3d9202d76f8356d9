"""The likelihood gate: drops responses that are implausible for their source and length.

It looks for faults (cut or garbled text, a wrong response pasted in), not for quality: choosing
the most likely rows across prompts is a bad selector (GRAPE, arXiv 2502.04194, table 2). So a row
is held only against rows of the same source and similar length, by the modified z-score of
Iglewicz & Hoaglin (1993), and no more than a small share of the pool can go.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.rows.selection import Selection, decisions

_STATE = {"source": pl.String, "n_tokens": pl.Int64, "logprob_mean": pl.Float64}


LENGTH_BINS = 4
"""Length bins a source is cut into, of about equal counts: quartiles."""


@dataclass(frozen=True)
class LikelihoodOutliers:
    """Drops outliers of the mean log-probability within source x response length.

    Buckets hold `id`, `source`, `n_tokens` and `logprob_mean` (nats a token). The state is the
    last three columns, about 20 bytes a row: exact medians of 100 million rows take 2 GB.

    Attributes:
        max_drop: Largest share of the pool to drop; the worst go first.
        tail: "low" drops implausible responses; "both" also those far too likely (copies of the
            prompt, loops).
        cut: Modified z-score beyond which a row is an outlier (Iglewicz & Hoaglin: 3.5).
        min_group: Fewest rows of a bin. Smaller sources are not judged; facts count their rows.
    """

    max_drop: float = 0.01
    tail: Literal["low", "both"] = "low"
    cut: float = 3.5
    min_group: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop <= 1:
            raise ValueError(f"max_drop is {self.max_drop}: give a share from 0 to 1")
        if self.tail not in ("low", "both"):
            raise ValueError(f"tail is {self.tail!r}: use 'low' or 'both'")
        if not self.cut > 0:
            raise ValueError(f"cut is {self.cut}: give a z-score above 0")
        if self.min_group < 2:
            raise ValueError(f"min_group is {self.min_group}: give at least 2 rows a group")

    def summarise(self, bucket: pl.DataFrame) -> pl.DataFrame:
        missing = bucket.filter(~pl.col("logprob_mean").is_finite().fill_null(False))
        if not missing.is_empty():
            raise ValueError(
                f"{missing.height} rows have no finite logprob_mean, first {missing['id'][0]}: "
                "score them or leave failed rows out"
            )
        return _narrow(bucket).drop("id")

    def decide(self, states: Sequence[pl.DataFrame]) -> "Plan":
        pool = pl.concat(list(states)) if states else pl.DataFrame(schema=_STATE)
        # Sorting makes every number below independent of the order rows came in.
        pool = pool.sort("source", "n_tokens", "logprob_mean")
        groups = [
            group
            for (source,), rows in pool.group_by("source", maintain_order=True)
            for group in self._groups(str(source), rows)
        ]
        table = pl.DataFrame(groups, schema=_GROUPS, orient="row")
        severity = self._severity(_locate(pool, table))
        z = np.sort(severity[~np.isnan(severity)])[::-1]
        allowed = int(self.max_drop * pool.height + 1e-9)
        outliers = int((z > self.cut).sum())
        # With too many outliers the cut rises to the first one that must stay; its ties stay too.
        cut = float(z[allowed]) if outliers > allowed else self.cut
        facts = {
            "rows": pool.height,
            "groups": table.height,
            "outliers": outliers,
            "allowed": allowed,
            "cut": cut,
            "unjudged": pool.height - len(z),
        }
        return Plan(table, cut, facts)

    def apply(self, bucket: pl.DataFrame, plan: "Plan") -> Selection:
        rows = _locate(_narrow(bucket).sort("id"), plan.groups)
        severity = self._severity(rows)
        low = pl.lit(self.tail == "low") | (pl.col("logprob_mean") < pl.col("median"))
        side = pl.when(low).then(-1.0).otherwise(1.0)
        names = pl.when(low).then(pl.lit("low")).otherwise(pl.lit("high"))
        shown = rows.select(
            bound=pl.col("median") + side * plan.cut * pl.col("scale"),
            reason=pl.lit("likelihood_outlier_") + names,
        )
        decided = decisions(
            rows["id"],
            kept=pl.Series(~(severity > plan.cut)),  # unjudged rows have NaN and stay
            reason=shown["reason"],
            value=rows["logprob_mean"],
            threshold=shown["bound"],
        )
        return Selection(decided, plan.facts, {"groups": plan.groups}, plan.vacuous)

    def _groups(self, source: str, rows: pl.DataFrame) -> list[tuple[Any, ...]]:
        """Cuts one source, sorted by length, into bins with their median and scale."""
        n = rows.height
        bins = min(LENGTH_BINS, n // self.min_group)
        if bins == 0:
            return []
        lengths = rows["n_tokens"].to_numpy()
        ends = [0]
        for i in range(1, bins):
            # A bin ends after the last row of its last length: equal lengths are never separated.
            end = int(np.searchsorted(lengths, lengths[n * i // bins - 1], side="right"))
            if end - ends[-1] >= self.min_group and n - end >= self.min_group:
                ends.append(end)
        ends.append(n)
        values = rows["logprob_mean"].to_numpy()
        groups: list[tuple[Any, ...]] = []
        for start, stop in pairwise(ends):
            median, scale = robust_scale(values[start:stop])
            # The first bin also takes shorter responses than any seen.
            shortest = int(lengths[start]) if start else 0
            groups.append((source, shortest, stop - start, median, scale))
        return groups

    def _severity(self, located: pl.DataFrame) -> np.ndarray:
        """Distance from the group's median in scales; NaN where no group judges the row."""
        distance = (located["median"] - located["logprob_mean"]).to_numpy().astype(np.float64)
        if self.tail == "both":
            distance = np.abs(distance)
        scale = located["scale"].to_numpy().astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            # A scale of 0 means all rows of the group are equal.
            return np.where(distance == 0, 0.0, distance / scale)


_GROUPS = {
    "source": pl.String,
    "n_tokens_from": pl.Int64,
    "rows": pl.Int64,
    "median": pl.Float64,
    "scale": pl.Float64,
}


@dataclass(frozen=True)
class Plan:
    """The groups (source, shortest response, rows, median, scale), the cut in use, the facts."""

    groups: pl.DataFrame
    cut: float
    facts: dict[str, Any]

    @property
    def vacuous(self) -> bool:
        """True when nothing was allowed to go or no group was large enough."""
        return self.groups.is_empty() or self.facts["allowed"] == 0


def robust_scale(values: np.ndarray) -> tuple[float, float]:
    """Median and a standard deviation that outliers hardly move.

    The scale is 1.4826 MAD, or 1.2533 times the mean absolute deviation where more than half of
    the values are equal (Iglewicz & Hoaglin 1993); 0 only where all are.

    Args:
        values: Numbers, shape (n,), n >= 1.

    Returns:
        Median and scale.
    """
    median = float(np.median(values))
    deviation = np.abs(values - median)
    mad = float(np.median(deviation))
    return median, 1.4826 * mad if mad > 0 else 1.2533 * float(np.sort(deviation).mean())


def _narrow(bucket: pl.DataFrame) -> pl.DataFrame:
    """The columns in use; rows without a source form a group of their own."""
    return bucket.select(
        pl.col("id"),
        pl.col("source").cast(pl.String).fill_null(""),
        pl.col("n_tokens").cast(pl.Int64),
        pl.col("logprob_mean").cast(pl.Float64),
    )


def _locate(rows: pl.DataFrame, groups: pl.DataFrame) -> pl.DataFrame:
    """Adds each row's group statistics, null where its source is not judged; keeps the order."""
    starts = groups.select("source", "n_tokens_from", "median", "scale").sort("n_tokens_from")
    ordered = rows.with_row_index("order").sort("n_tokens")
    return (
        ordered.join_asof(
            starts,
            left_on="n_tokens",
            right_on="n_tokens_from",
            by="source",
            strategy="backward",
            check_sortedness=False,
        )
        .sort("order")
        .drop("order")
    )
