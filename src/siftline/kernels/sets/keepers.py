"""Who stays: rows in keep order, each held against the kept rows it shares a band with.

A row goes only for a kept row that it was verified similar to, the first in keep order; a removed
row removes nobody. As in `greedy`, a band group is a chain of its kept rows, so m copies cost m
comparisons and not m^2. What is new here is memory of an earlier decision: where rows arrive later,
an old row is held only against what changed since (new rows, and old ones kept now but not then),
which gives the decisions of doing everything at once.

`drop_all` is the other policy: every row that resembles any other goes, the first as well.

Which of several copies stays: the policy as a number for every row, smaller is kept first.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from siftline.kernels.machine import Kernel

Policy = Literal["first", "longest", "score", "source", "none"]
FORMS = "first, longest, none, score:COLUMN or source:COLUMN=A,B,..."


@dataclass(frozen=True)
class Keep:
    """A policy; ties always go to the earlier row.

    Attributes:
        policy: first in row order; longest text in characters; highest score; the source that is
            named first; none of them.
        column: Where the score or the source stands.
        sources: Sources in order; others come after all of them.
    """

    policy: Policy = "first"
    column: str | None = None
    sources: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Keep":
        """Reads a policy as the command line takes it.

        Raises:
            ValueError: if it is none of FORMS.
        """
        if text in ("first", "longest", "none"):
            return cls(text)  # type: ignore[arg-type]
        policy, _, rest = text.partition(":")
        if policy == "score" and rest:
            return cls("score", rest)
        column, mark, names = rest.partition("=")
        if policy == "source" and column and mark and names:
            return cls("source", column, tuple(names.split(",")))
        raise ValueError(f"keep={text!r}: give {FORMS}")

    def __str__(self) -> str:
        if self.policy == "source":
            return f"source:{self.column}={','.join(self.sources)}"
        return f"score:{self.column}" if self.policy == "score" else self.policy

    @property
    def ordered(self) -> bool:
        """Whether anything but the row's place decides."""
        return self.policy not in ("first", "none")

    def priority(self, text: pa.Array, column: pa.Array | None) -> np.ndarray:
        """One number a row, float64, smaller is kept first; what is missing comes last.

        Args:
            text: The texts of n rows.
            column: Their scores or sources, where the policy has a column.

        Raises:
            ValueError: if scores are not numbers.
        """
        if not self.ordered:
            return np.zeros(len(text), np.float64)
        import pyarrow.compute as pc  # 0.03 s, and most policies need none of it

        if self.policy == "longest":
            found = pc.negate(pc.cast(pc.utf8_length(text.cast(pa.large_string())), pa.float64()))
        elif self.policy == "score":
            assert column is not None
            kind = column.type
            if pa.types.is_null(kind):
                return np.full(len(text), np.inf)
            numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            if not (numeric or pa.types.is_decimal(kind) or pa.types.is_boolean(kind)):
                raise ValueError(f"column {self.column!r} holds {kind}: a score must be a number")
            if pa.types.is_boolean(kind):
                column = column.cast(pa.int8())
            found = pc.negate(column.cast(pa.float64(), safe=False))
        else:
            assert column is not None
            names = pa.array(self.sources, pa.string())
            place = pc.index_in(column.cast(pa.string()), names)
            found = pc.cast(pc.fill_null(place, len(self.sources)), pa.float64())
        values = found.to_numpy(zero_copy_only=False).astype(np.float64)
        return np.where(np.isnan(values), np.inf, values)


def as_integers(values: np.ndarray) -> np.ndarray:
    """int64 numbers in the order of some floats, 0.0 and -0.0 equal; none may be NaN."""
    # Bits of floats order as integers do, once those of negative ones are turned over.
    bits = (values + 0.0).view(np.int64)
    return np.where(bits < 0, bits ^ np.int64(2**63 - 1), bits)


_keep_first = Kernel("siftline.kernels.sets.keeper_loops", "keep_first")
_drop_all = Kernel("siftline.kernels.sets.keeper_loops", "drop_all")

NEW = -2
"""Earlier decision of a row there was none for."""
KEPT = -1


class Candidates(NamedTuple):
    """m rows in keep order, each of which shares a band with another.

    Attributes:
        lists: int64, shape (m + 1,): row i is in groups[lists[i]:lists[i + 1]].
        groups: int32 group numbers.
        hashes: uint64, shape (m,): of the texts' bytes; stands in for an empty set.
        values: uint32 shingle hashes, ascending and distinct within a row.
        starts: int64, shape (m,): where a row's hashes start.
        sizes: int32, shape (m,): how many it has.
    """

    lists: np.ndarray
    groups: np.ndarray
    hashes: np.ndarray
    values: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray


class Decisions(NamedTuple):
    """What became of m rows; arrays of shape (m,).

    Attributes:
        matched: int32 position of the kept row that row i lost to, KEPT where it is kept.
        value: float64 similarity to that row, 0 where it is kept.
    """

    matched: np.ndarray
    value: np.ndarray


def keep_first(
    rows: Candidates, n_groups: int, threshold: float, max_pairs: int, before: Decisions
) -> tuple[Decisions, int]:
    """Decides row by row in keep order.

    Args:
        rows: m rows in keep order.
        n_groups: Number of groups.
        threshold: Jaccard similarity in (0, 1].
        max_pairs: Most pairs to compare.
        before: Earlier decisions on these rows, NEW in `matched` where there was none.

    Returns:
        The decisions, and how many pairs were compared.

    Raises:
        ValueError: if more than `max_pairs` comparisons are needed.
    """
    m = _checked(rows, n_groups)
    assert before.matched.max(initial=-1) < m, "earlier matches must point into the rows"
    now = Decisions(np.full(m, KEPT, np.int32), np.zeros(m, np.float64))
    links = len(rows.groups)
    chains = [np.full(size, -1, np.int32) for size in (n_groups, n_groups, links, links)]
    seen = np.full(m, -1, np.int32)
    pairs = _keep_first(rows, *chains, seen, threshold, max_pairs, before, now)
    return now, _within(pairs, max_pairs, threshold)


def drop_all(
    rows: Candidates, n_groups: int, threshold: float, max_pairs: int
) -> tuple[Decisions, int]:
    """Matches every row with the first other row that it is similar to, removed or not.

    Raises:
        ValueError: if more than `max_pairs` comparisons are needed.
    """
    m = _checked(rows, n_groups)
    now = Decisions(np.full(m, KEPT, np.int32), np.zeros(m, np.float64))
    members, starts = np.empty(len(rows.groups), np.int32), np.zeros(n_groups + 2, np.int64)
    seen = np.full(m, -1, np.int32)
    pairs = _drop_all(rows, members, starts, seen, threshold, max_pairs, now)
    return now, _within(pairs, max_pairs, threshold)


def keep_first_reference(sets: list[set[int]], threshold: float) -> list[int]:
    """`Decisions.matched` of rows in keep order by comparing each with every kept row."""
    from siftline.kernels.sets.jaccard import jaccard_reference

    kept: list[int] = []
    matched = []
    for i, mine in enumerate(sets):
        near = [j for j in kept if jaccard_reference(mine, sets[j]) >= threshold]
        matched.append(near[0] if near else KEPT)
        if not near:
            kept.append(i)
    return matched


def drop_all_reference(sets: list[set[int]], threshold: float) -> list[int]:
    """`Decisions.matched` of `drop_all` by comparing all with all."""
    from siftline.kernels.sets.jaccard import jaccard_reference

    return [
        next(
            (
                j
                for j, other in enumerate(sets)
                if j != i and jaccard_reference(mine, other) >= threshold
            ),
            KEPT,
        )
        for i, mine in enumerate(sets)
    ]


def _checked(rows: Candidates, n_groups: int) -> int:
    # Compiled code does not check bounds.
    m = len(rows.sizes)
    assert len(rows.lists) == m + 1
    assert len(rows.hashes) == len(rows.starts) == m
    assert rows.groups.max(initial=-1) < n_groups, "groups must be numbered below n_groups"
    assert m == 0 or int((rows.starts + rows.sizes).max()) <= len(rows.values)
    return m


def _within(pairs: int, max_pairs: int, threshold: float) -> int:
    if pairs > max_pairs:
        raise ValueError(
            f"more than {max_pairs:,} candidate pairs: many rows resemble each other below the "
            f"threshold {threshold}; raise the threshold or deduplicate the files by source"
        )
    return int(pairs)
