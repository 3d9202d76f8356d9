"""How far a confidence can be believed, and on whom a threshold falls.

Wherever rows are known to be right or wrong, confidence can be held against it: a reliability curve
with its expected calibration error (Naeini et al. 2015; Guo et al. 2017), and the AUROC of the
whole and of each part. The shares kept by group show a gate that only lets the easy rows pass.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from siftline.stages.confidence.decide import auroc

BINS = 10
SHOWN_GROUPS = 20
"""Groups listed in a stage's facts; the side table has them all."""


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[dict]:
    """Mean confidence and share right in bins of equal width.

    Args:
        confidence: In [0, 1], shape (n,).
        right: Booleans, shape (n,).
        bins: How many; 10 as is usual. A value on an edge belongs to the bin above it, 1 to the
            last.

    Returns:
        One entry per bin: low, high, rows, confidence and right (both null without rows).

    Raises:
        ValueError: if a confidence is not in [0, 1].
    """
    values = np.asarray(confidence, np.float64)
    labels = np.asarray(right, bool)
    if not np.all((values >= 0) & (values <= 1)):
        raise ValueError(f"confidences reach from {values.min()} to {values.max()}: give 0 to 1")
    # Against the edges themselves: 0.3 * 10 is below 3 in some orders of rounding.
    edges = np.arange(bins + 1) / bins
    at = np.minimum(np.searchsorted(edges, values, side="right") - 1, bins - 1)
    lines = []
    for k in range(bins):
        here = at == k
        rows = int(here.sum())
        lines.append(
            {
                "low": float(edges[k]),
                "high": float(edges[k + 1]),
                "rows": rows,
                "confidence": float(values[here].mean()) if rows else None,
                "right": float(labels[here].mean()) if rows else None,
            }
        )
    return lines


def calibration_error(lines: Sequence[dict]) -> float | None:
    """Expected calibration error: mean |confidence - share right| over rows; None without any."""
    rows = sum(line["rows"] for line in lines)
    if not rows:
        return None
    gaps = (
        line["rows"] * abs(line["confidence"] - line["right"]) for line in lines if line["rows"]
    )
    return float(sum(gaps) / rows)


def ranking(scores: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """AUROC with its interval, as facts; null where a class has fewer than two rows.

    Args:
        scores: Shape (n,), NaN where a row has none; those are left out.
        right: Booleans, shape (n,).
    """
    known = ~np.isnan(np.asarray(scores, np.float64))
    values, labels = np.asarray(scores, np.float64)[known], np.asarray(right, bool)[known]
    found: dict[str, Any] = {"rows": len(values), "value": None, "low": None, "high": None}
    if min(int(labels.sum()), int((~labels).sum())) >= 2:
        found |= auroc(values, labels)._asdict()
    return found


def calibration(frame: pl.DataFrame, parts: Sequence[str]) -> dict[str, Any]:
    """What is known of a confidence where rows are known to be right or wrong.

    Args:
        frame: Columns `confidence`, `right` (boolean) and one for each part; null where unknown.
            Rows without `right` or `confidence` are left out.
        parts: Names of the parts.

    Returns:
        rows, right, error (expected calibration error), bins (`reliability`), and auroc by part
        and for "confidence" (`ranking`).
    """
    known = frame.filter(pl.col("right").is_not_null() & pl.col("confidence").is_not_null())
    known = known.sort("confidence", "right", *parts)  # sums of floats depend on their order
    right = known["right"].to_numpy().astype(bool)
    bins = reliability(known["confidence"].to_numpy(), right)
    scores = {name: known[name].cast(pl.Float64).to_numpy() for name in ("confidence", *parts)}
    return {
        "rows": known.height,
        "right": int(right.sum()),
        "error": calibration_error(bins),
        "bins": bins,
        "auroc": {name: ranking(values, right) for name, values in scores.items()},
    }


def kept_by(frame: pl.DataFrame, group: str) -> pl.DataFrame:
    """Rows and rows kept of every group, largest first, ties by name.

    Args:
        frame: Columns `kept` and the group's; rows without a group are left out.
        group: Name of the column.

    Returns:
        by (the column's name), group, rows, kept, share.
    """
    return (
        frame.filter(pl.col(group).is_not_null())
        .group_by(pl.col(group).cast(pl.String).alias("group"))
        .agg(pl.len().cast(pl.Int64).alias("rows"), pl.col("kept").sum().cast(pl.Int64))
        .with_columns(pl.lit(group).alias("by"), (pl.col("kept") / pl.col("rows")).alias("share"))
        .sort("rows", "group", descending=[True, False])
        .select("by", "group", "rows", "kept", "share")
    )


def shown(table: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """The largest groups of `kept_by` as facts, by name; the rest together as "(others)"."""
    lines = table.to_dicts()
    facts = {
        line["group"]: {name: line[name] for name in ("rows", "kept", "share")}
        for line in lines[:SHOWN_GROUPS]
    }
    rest = lines[SHOWN_GROUPS:]
    if rest:
        rows, kept = sum(line["rows"] for line in rest), sum(line["kept"] for line in rest)
        facts["(others)"] = {"rows": rows, "kept": kept, "share": kept / rows}
    return facts
