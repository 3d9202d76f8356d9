"""What every selector returns, and the three steps every selector has.

A selector is a frozen dataclass (its fields are its configuration) with

    summarise(bucket) -> state      one bucket's contribution, small
    decide(states)    -> plan       the global decision: thresholds, quotas, survivors
    apply(bucket, plan) -> Selection

so that a pool larger than memory streams through twice, one bucket at a time. `select` runs the
three on a single frame. Frames are narrow polars tables keyed by `id`; a row is never addressed by
its position across two frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import polars as pl

DECISION = {
    "id": pl.String,
    "kept": pl.Boolean,
    "reason": pl.String,  # why it went; null where it stayed
    "value": pl.Float64,  # the number that decided
    "threshold": pl.Float64,  # what it was held against
    "matched_id": pl.String,  # the kept row it lost to
}


@dataclass(frozen=True)
class Selection:
    """The decision of one stage about one bucket (or a whole pool).

    Attributes:
        decisions: One line per row that came in, columns of `DECISION`, sorted by id.
        facts: Numbers worth showing: thresholds, quotas, counts. JSON-serialisable.
        tables: Side tables by name (clusters, conflicts, difficulty), each a polars frame.
        vacuous: True when there was nothing to choose (no target, one cluster, every row fits).
    """

    decisions: pl.DataFrame
    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    vacuous: bool = False

    def __post_init__(self) -> None:
        assert dict(self.decisions.schema) == DECISION, self.decisions.schema

    @property
    def kept(self) -> pl.Series:
        """Ids of the kept rows."""
        return self.decisions.filter("kept")["id"]

    @property
    def removed(self) -> pl.DataFrame:
        """Decisions about the removed rows."""
        return self.decisions.filter(~pl.col("kept"))


def decisions(
    ids: pl.Series | Sequence[str],
    *,
    kept: pl.Series | Sequence[bool],
    reason: pl.Series | Sequence[str | None] | str | None = None,
    value: pl.Series | Sequence[float | None] | None = None,
    threshold: pl.Series | Sequence[float | None] | float | None = None,
    matched_id: pl.Series | Sequence[str | None] | None = None,
) -> pl.DataFrame:
    """Builds a decisions frame of `DECISION`, sorted by id; reasons of kept rows are cleared.

    One reason or threshold stands for all rows.
    """
    frame = pl.DataFrame({"id": ids, "kept": kept}, schema={"id": pl.String, "kept": pl.Boolean})
    for name, given in (
        ("reason", reason),
        ("value", value),
        ("threshold", threshold),
        ("matched_id", matched_id),
    ):
        if given is None or isinstance(given, float | int | str):
            column = pl.lit(given, dtype=DECISION[name]).alias(name)
        else:
            column = pl.Series(name, given, dtype=DECISION[name], strict=False)  # type: ignore[assignment]
        frame = frame.with_columns(column)
    cleared = pl.when(~pl.col("kept")).then(pl.col("reason")).alias("reason")
    frame = frame.with_columns(cleared).select(list(DECISION)).sort("id")
    undecided = frame.filter(~pl.col("kept") & pl.col("reason").is_null())
    assert undecided.is_empty(), f"{undecided.height} removed rows without a reason"
    return frame


State = TypeVar("State")
Plan = TypeVar("Plan")


class Selector(Protocol[State, Plan]):
    """The contract of every selector; see the module's docstring."""

    def summarise(self, bucket: pl.DataFrame) -> State: ...
    def decide(self, states: Sequence[State]) -> Plan: ...
    def apply(self, bucket: pl.DataFrame, plan: Plan) -> Selection: ...


def select(selector: Selector[State, Plan], frame: pl.DataFrame) -> Selection:
    """Runs a selector on a pool that is one bucket."""
    return selector.apply(frame, selector.decide([selector.summarise(frame)]))
