"""Canaries: how many defects of each kind a gate finds in the user's own data.

A gate decides about the real rows first. Then rows that it kept are drawn by hash, spoiled (see
`planting`), and judged by the plan the gate just made. That held_rows ends there: a canary is no
row of any later stage, so with or without canaries the published bytes are the same.

Each kind is measured at the gates that should find it, on rows of that gate. Recall is
the share of planted rows that the gate removed. A false drop is a removed row that is sound by
construction, or, for gates that ask a model, a real row whose response verification proved right.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Recipe
from siftline.recipe.sections import Canaries
from siftline.rows import schema
from siftline.rows.ledger import KEPT, StageResult
from siftline.rows.shards import no_rows
from siftline.stages.context import Context, StageRun
from siftline.stages.held_rows import HeldRows, first
from siftline.stages.planting import DEFECTS, SOUND, Canary, Row
from siftline.training.intervals import wilson

Judged = tuple[pl.DataFrame, dict[str, str]]
"""Decisions on planted rows (columns of `selection.DECISION`), and reasons of rows that failed."""
Judge = Callable[[pa.Table], Judged]

SPARE = 3
"""Rows drawn for one planted: some have nothing of a kind to spoil."""

LINES = {
    "kind": pl.String,
    "source_id": pl.String,
    "id": pl.String,
    "caught": pl.Boolean,
    "reason": pl.String,
    "value": pl.Float64,
}
_ROWS = pa.schema([f.with_nullable(True) for f in schema.ADDED])


def measured(context: Context, judge: Judge, run: StageRun) -> StageRun:
    """Plants every kind of this gate, has it judged, and adds what came of it to the gate's output.

    Returns:
        The same decisions; with canaries also a side table `canaries` (columns of `LINES`) and a
        fact of that name, one entry per kind: kind, sound (whether a removal is a false drop),
        planted, removed, failed, share, low, high (Wilson, 95 %; null where nothing was judged).
    """
    asked = canaries_of(context.recipe, context.stage)
    if asked is None:
        return run
    lines, facts = [pl.DataFrame(schema=LINES)], []
    known = sorted(i for r in run.results for i in [*r.decisions["id"].to_list(), *r.failed])
    kept = sorted(i for r in run.results for i in r.decisions.filter("kept")["id"].to_list())
    for kind, rows in _drawn(context, known, kept).items():
        pairs = _pairs(rows, asked.per_kind)
        table, fact = _judged(judge, kind, _plant(kind, pairs, asked.per_kind, known))
        lines.append(table)
        facts.append(fact)
    # Sound by construction means nothing to a gate that asks a model: proven rows tell its drops.
    if context.stage.of.models(context.stage.options, context.recipe.budget):
        facts += _proven(context, run.results)
    context.emit(f"{context.stage.name}: {', '.join(map(_said, facts))}")
    tables = {**run.tables, "canaries": pl.concat(lines)}
    return StageRun(run.results, tables, {**run.facts, "canaries": facts})


def _judged(
    judge: Judge, kind: str, planted: Sequence[Canary]
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Lines and the fact of one kind."""
    if not planted:
        return pl.DataFrame(schema=LINES), _counted(kind, 0, 0, 0)
    decided, failed = judge(_table(planted))
    source = {canary.row["id"]: canary.source_id for canary in planted}
    shown = decided.select(
        pl.lit(kind).alias("kind"),
        pl.col("id").replace_strict(source, return_dtype=pl.String).alias("source_id"),
        "id",
        (~pl.col("kept")).alias("caught"),
        "reason",
        "value",
    )
    assert shown.height + len(failed) == len(source), "a canary was lost"
    return shown, _counted(kind, shown.height, int(shown["caught"].sum()), len(failed))


def _counted(kind: str, judged: int, removed: int, failed: int) -> dict[str, Any]:
    rate = wilson(removed, judged) if judged else None
    return {
        "kind": kind,
        "sound": kind in SOUND,
        "planted": judged,
        "removed": removed,
        "failed": failed,
        "share": rate.estimate if rate else None,
        "low": rate.low if rate else None,
        "high": rate.high if rate else None,
    }


def _said(line: dict[str, Any]) -> str:
    what = "dropped" if line["sound"] else "caught"
    return f"{line['kind']} {what} {line['removed']} of {line['planted']}"


def _proven(context: Context, results: Sequence[StageResult]) -> list[dict[str, Any]]:
    """False drops among the real rows that verification proved right; nothing where none ran."""
    verified = context.output("verify")
    if verified is None:
        return []
    judged = removed = 0
    for bucket, result in enumerate(results):
        lines = verified.decisions(bucket)
        right = lines.filter((pl.col("outcome") == KEPT) & (pl.col("value") == 1.0))["id"]
        mine = result.decisions.filter(pl.col("id").is_in(right.to_list()))
        judged += mine.height
        removed += int((~mine["kept"]).sum())
    return [_counted("proven", judged, removed, 0)]


def _plant(
    kind: str, pairs: Iterable[tuple[Row, Row]], wanted: int, known: Sequence[str]
) -> list[Canary]:
    """At most `wanted` canaries of a kind, from the first rows that have something to spoil.

    A canary that happens to be a row in play is none, nor is another question that happens to be
    asked there: removing either may be right.

    Args:
        kind: What is planted.
        pairs: Rows and their partners.
        wanted: Most canaries.
        known: Ids of the rows in play, ascending.
    """
    made: list[Canary] = []
    seen: set[str] = set()
    whole = schema.HALF_ID if kind == "other_question" else None
    for row, partner in pairs:
        spoiled = DEFECTS[kind](row, partner)
        if spoiled is None or spoiled["id"] in seen or _begins(known, spoiled["id"][:whole]):
            continue
        seen.add(spoiled["id"])
        made.append(Canary(kind, row["id"], spoiled))
        if len(made) == wanted:
            break
    return made


def _begins(known: Sequence[str], start: str) -> bool:
    """Whether one of some ascending ids begins so."""
    place = bisect_left(known, start)
    return place < len(known) and known[place].startswith(start)


def _pairs(rows: pa.Table, size: int) -> Iterator[tuple[Row, Row]]:
    """Every row with its partner, the row after it or the first; made `size` rows at a time."""
    for start in range(0, rows.num_rows, size):
        places = range(start, min(start + size, rows.num_rows) + 1)
        read = rows.take(pa.array([i % rows.num_rows for i in places])).to_pylist()
        yield from pairwise(read)


def _kinds(stage: Stage) -> tuple[str, ...]:
    """Kinds of this gate; a marked final answer is sound only to verifiers that look for one."""
    kinds = stage.of.planted
    marked = getattr(stage.options, "verifier", "math") in ("math", "choice")
    return kinds if marked else tuple(kind for kind in kinds if kind != "gold_answer")


def _count(recipe: Recipe) -> int:
    """Rows drawn for each kind."""
    assert recipe.canaries is not None
    return SPARE * recipe.canaries.per_kind + 1


def canaries_of(recipe: Recipe, stage: Stage) -> Canaries | None:
    """What the recipe says of canaries, for a stage that any are planted before; else None."""
    return recipe.canaries if stage.of.planted and stage.scope == "all" else None


def held_rows_of(recipe: Recipe, stage: Stage, rows: int) -> HeldRows | None:
    """Where a gate with so many rows leaves those that its canaries are made of."""
    if canaries_of(recipe, stage) is None:
        return None
    own = [kind for kind in _kinds(stage) if kind != "leaked"]
    return HeldRows(recipe.seed, _count(recipe) * len(own), rows)


def _drawn(context: Context, known: Sequence[str], kept: Sequence[str]) -> dict[str, pa.Table]:
    """Rows for each kind of this gate in the order of their draws, no row twice in large pools.

    Leaks are drawn from the evaluation sets, the other kinds from `kept`: what the gate removed is
    no sound start. Those are read once for all kinds.
    """
    kinds, count, seed = _kinds(context.stage), _count(context.recipe), context.recipe.seed
    own = [kind for kind in kinds if kind != "leaked"]
    total = min(count * len(own), len(kept))
    rows = context.held_rows.first(kept, total, len(known)) if context.held_rows else None
    if rows is None:
        wanted = [kept[i] for i in first(seed, kept, total)]
        read = context.rows_of(set(wanted))
        rows = read.take(pa.compute.index_in(pa.array(wanted, pa.string()), read["id"]))
    drawn = {}
    # One order for all kinds; each begins where the one before it ends, and goes round.
    for k, kind in enumerate(own):
        places = [(k * count + j) % total for j in range(min(count, total))]
        drawn[kind] = rows.take(pa.array(places, pa.int64()))
    if "leaked" in kinds:
        sets = [Pool(context.workspace.pool(spec.name)) for _, spec in context.recipe.sets.items()]
        held = pa.concat_tables([no_rows(schema.ROW), *(pool.all_rows() for pool in sets)])
        ids = held.column("id").to_pylist()
        drawn["leaked"] = held.take(pa.array(first(seed, ids, min(count, len(ids)))))
    return {kind: drawn[kind] for kind in kinds}


def _table(planted: Sequence[Canary]) -> pa.Table:
    lines = [{**c.row, "parent_id": c.source_id, "origin": "canary"} for c in planted]
    return pa.Table.from_pylist(lines, schema=_ROWS).sort_by("id")
