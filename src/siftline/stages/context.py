"""What a stage sees: the rows in play, the stages before it, evaluation sets and models.

Rows in play are the rows that the stage before kept or added. They are read bucket by bucket, from
the pool and from what earlier stages added; the pool itself is never copied.

Rows that canaries may be made of, held back while a gate reads its rows.

What a gate decided about every bucket, as one output.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.kernels.draws import gumbel_top_k, quick_uniforms
from siftline.progress import Progress
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Recipe
from siftline.rows import schema
from siftline.rows.ledger import KEPT, StageOutput, StageResult
from siftline.rows.selection import DECISION, Selection
from siftline.rows.shards import no_rows
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.recorder import Recorder
from siftline.stages.models import Engines, model_spec
from siftline.store import store
from siftline.workspace import Workspace

_ROOM = 2
"""Rows held for one wanted: a gate may remove half of its rows before they are read again."""


class HeldRows:
    """Rows of one gate with the highest draws.

    Args:
        seed: The recipe's.
        wanted: Most rows that will be asked for.
        rows: Rows that the gate reads.
    """

    def __init__(self, seed: int, wanted: int, rows: int) -> None:
        self.seed = seed
        self.floor = 1.0 - min(1.0, _ROOM * wanted / rows)
        self._held: dict[int, pa.Table] = {}
        self._seen: dict[int, int] = {}

    def offer(self, bucket: int, rows: pa.Table) -> None:
        """Takes what it wants of the rows in play of a bucket; once is enough."""
        if bucket in self._seen:
            return
        drawn = draws(self.seed, rows.column("id").to_pylist())
        self._held[bucket] = rows.take(pa.array(np.flatnonzero(drawn > self.floor)))
        self._seen[bucket] = rows.num_rows

    def first(self, kept: Sequence[str], count: int, rows: int) -> pa.Table | None:
        """The rows that come first in the order of draws.

        Args:
            kept: Ids of the rows asked for, ascending.
            count: How many of them, at most `len(kept)`.
            rows: Rows in play of the gate.

        Returns:
            `count` rows, best draw first; None where they can't be told, or are not held.
        """
        if sum(self._seen.values()) != rows or not self._held:
            return None
        held = pa.concat_tables(self._held.values())
        ids = held.column("id").to_pylist()
        places = [place for place, i in enumerate(ids) if _among(i, kept)]
        if len(places) < count:
            return None
        best = first(self.seed, [ids[place] for place in places], count)
        return held.take(pa.array([places[i] for i in best], pa.int64()))


def _among(identity: str, ids: Sequence[str]) -> bool:
    place = bisect_left(ids, identity)
    return place < len(ids) and ids[place] == identity


def draws(seed: int, ids: Sequence[str]) -> np.ndarray:
    """The draw of each row, float64 in (0, 1): the same at every gate."""
    return quick_uniforms(seed, "canary", ids)


def first(seed: int, ids: Sequence[str], count: int) -> np.ndarray:
    """Positions of the `count` ids that come first in the order of their draws."""
    return gumbel_top_k(draws(seed, ids), ids, count)


@dataclass(frozen=True)
class StageRun:
    """What a stage computed: one result per bucket, side tables, and facts to report."""

    results: list[StageResult]
    tables: dict[str, pl.DataFrame]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Context:
    """One stage instance and its surroundings.

    Attributes:
        workspace: The root.
        recipe: The whole recipe.
        stage: This instance.
        pool: The recipe's pool.
        before: The instances before this one with their outputs, in order.
        opened: Engines of this process.
        emit: Takes one line of progress.
        held_rows: Where rows that canaries may be made of are held back as they are read.
    """

    workspace: Workspace
    recipe: Recipe
    stage: Stage
    pool: Pool
    before: Sequence[tuple[Stage, StageOutput]]
    opened: Engines
    emit: Callable[[str], None]
    held_rows: HeldRows | None = None

    @property
    def buckets(self) -> range:
        """Bucket numbers."""
        return range(self.pool.buckets)

    def in_play(self, bucket: int) -> list[str]:
        """Ids of the rows in play, sorted."""
        if not self.before:
            return self.pool.rows(bucket, ["id"]).column("id").to_pylist()
        return (
            self.before[-1][1].decisions(bucket).filter(pl.col("outcome") == KEPT)["id"].to_list()
        )

    def rows(self, bucket: int) -> pa.Table:
        """Rows in play of one bucket (columns of `schema.ADDED`), sorted by id."""
        rows = self.everything(bucket, self.in_play(bucket))
        if self.held_rows is not None:
            self.held_rows.offer(bucket, rows)
        return rows

    def everything(self, bucket: int, ids: Sequence[str]) -> pa.Table:
        """Rows with these ids, of the pool or added by any stage so far, in play or not."""
        base = self.pool.rows(bucket)
        blank = pa.nulls(base.num_rows, pa.string())
        base = base.append_column("parent_id", blank).append_column("origin", blank)
        extra = [output.added(bucket) for _, output in self.before]
        everything = pa.concat_tables([base.cast(_ADDED), *(t.cast(_ADDED) for t in extra)])
        wanted = pa.array(ids, pa.string())
        return everything.filter(pa.compute.is_in(everything["id"], wanted)).sort_by("id")

    def known(self, bucket: int) -> set[str]:
        """Ids of the pool's rows and of all that stages before this one added, in play or not."""
        ids = set(self.pool.rows(bucket, ["id"]).column("id").to_pylist())
        for _, output in self.before:
            ids |= set(output.added(bucket).column("id").to_pylist())
        return ids

    def rows_of(self, ids: set[str]) -> pa.Table:
        """The rows in play with one of these ids, bucket by bucket, sorted by id."""
        wanted = pa.array(sorted(ids), pa.string())
        buckets = sorted({schema.bucket_of(i, self.pool.buckets) for i in ids})
        found = [self.rows(b) for b in buckets]
        picked = [rows.filter(pa.compute.is_in(rows["id"], wanted)) for rows in found]
        return pa.concat_tables([no_rows(_ADDED), *picked])

    def judged(self, bucket: int) -> set[str] | None:
        """Ids this instance has to judge; None means all.

        An instance with scope "added" judges the rows that came after its original did its work.
        """
        if self.stage.scope == "all":
            return None
        originals = [
            i
            for i, (stage, _) in enumerate(self.before)
            if stage.kind == self.stage.kind and stage.options == self.stage.options
        ]
        new: set[str] = set()
        for _, output in self.before[originals[0] + 1 :]:
            new |= set(output.added(bucket).column("id").to_pylist())
        return new

    def output(self, kind: str) -> StageOutput | None:
        """Output of the last instance of a kind before this one, or None."""
        found = [output for stage, output in self.before if stage.kind == kind]
        return found[-1] if found else None

    def side_table(self, name: str) -> pl.DataFrame | None:
        """The last side table of a name that a stage before this one wrote, or None."""
        for _, output in reversed(self.before):
            table = output.table(name)
            if table is not None:
                return table
        return None

    def spec(self, role: str) -> ModelSpec:
        """How the model of a role is run."""
        return model_spec(self.workspace, self.recipe, role)

    def recorder(self, role: str, progress: Progress | None = None) -> Recorder:
        """A recorder on the model of a role; the model is loaded now."""
        advance = progress.advance if progress else (lambda rows, tokens: None)
        return self.opened.recorder(self.spec(role), self.workspace.store, advance)

    def recorders(self, role: str, progress: Progress) -> list[Recorder]:
        """One recorder on the model of a role for each of its devices."""
        return self.opened.recorders(self.spec(role), self.workspace.store, progress.advance)

    def store_buckets(self) -> Iterator[tuple[int, pa.Table]]:
        """Rows in play by store bucket, whose cut does not depend on the pool's."""
        yield from by_store_bucket(self.rows, self.pool.buckets)


_ADDED = pa.schema([f.with_nullable(True) for f in schema.ADDED])


def by_store_bucket(
    rows: Callable[[int], pa.Table], buckets: int
) -> Iterator[tuple[int, pa.Table]]:
    """Recuts bucketed rows into the store's buckets, in order.

    Args:
        rows: Reads one bucket of `buckets`; has a column id.
        buckets: A power of two.

    Yields:
        Store bucket and its rows, empty ones left out.
    """
    if buckets >= store.BUCKETS:
        width = buckets // store.BUCKETS
        for bucket in range(store.BUCKETS):
            table = pa.concat_tables(rows(b) for b in range(bucket * width, (bucket + 1) * width))
            if table.num_rows:
                yield bucket, table
        return
    for coarse in range(buckets):
        table = rows(coarse)
        of = [schema.bucket_of(i, store.BUCKETS) for i in table.column("id").to_pylist()]
        for bucket in sorted(set(of)):
            yield bucket, table.filter(pa.compute.equal(pa.array(of, pa.int64()), bucket))


def pass_earlier(selection: Selection, judged: set[str] | None) -> pl.DataFrame:
    """Decisions of a selection in which rows that were judged before stay, whatever it said."""
    if judged is None:
        return selection.decisions
    earlier = ~pl.col("id").is_in(list(judged))
    blank = [
        pl.when(earlier).then(None).otherwise(pl.col(name)).cast(DECISION[name]).alias(name)
        for name in ("reason", "value", "threshold", "matched_id")
    ]
    return selection.decisions.with_columns((pl.col("kept") | earlier).alias("kept"), *blank)


def split_failed(decisions: pl.DataFrame, failed: dict[str, str]) -> StageResult:
    """A result in which failed rows are not decided but recorded as failed."""
    left = decisions.filter(~pl.col("id").is_in(list(failed))) if failed else decisions
    return StageResult(left, failed)


UNDECIDED = ["verifier_error"]
"""Reasons that say the gate could not decide: such rows fail and are tried again."""


def gather(context: Context, selections: list[Selection], facts: dict[str, Any]) -> StageRun:
    """Joins the selections of all buckets; side tables are stacked."""
    names = sorted({name for selection in selections for name in selection.tables})
    stacked = {
        name: pl.concat([s.tables[name] for s in selections if name in s.tables]) for name in names
    }
    results = []
    for bucket, selection in enumerate(selections):
        decided = pass_earlier(selection, context.judged(bucket))
        results.append(split_failed(*without_undecided(decided)))
    vacuous = all(selection.vacuous for selection in selections)
    return StageRun(results, stacked, {**facts, "vacuous": vacuous})


def without_undecided(decided: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, str]]:
    """Decisions, and reasons by id of the rows that could not be decided."""
    open_ = pl.col("reason").is_in(UNDECIDED).fill_null(False)
    lost = decided.filter(open_)["id"].to_list()
    return decided.filter(~open_), dict.fromkeys(lost, UNDECIDED[0])
