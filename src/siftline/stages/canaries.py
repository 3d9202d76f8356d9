"""Canaries: how many defects of each kind a gate finds in the user's own data.

A gate decides about the real rows first. Then rows that it kept are drawn by hash, spoiled, and
judged by the plan the gate just made. With that a canary ends: it is no row of any later stage, so
with or without canaries the published bytes are the same.

Each kind is measured at the gates that should find it, on rows of that gate. Recall is
the share of planted rows that the gate removed. A false drop is a removed row that is sound by
construction, or, for gates that ask a model, a real row whose response verification proved right.

Defects planted into a user's own rows, to measure what a gate makes of them.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.kernels.draws import hash64
from siftline.kernels.text.words import words
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Recipe
from siftline.recipe.sections import Canaries
from siftline.rows import schema
from siftline.rows.ledger import KEPT, StageResult
from siftline.rows.shards import no_rows
from siftline.scoring.answers.quantities import answer_key
from siftline.stages.context import Context, HeldRows, StageRun, first
from siftline.training.intervals import wilson

CLOSE = 0.85
"""Similarity that a near copy keeps in prompt and response: above the gates' usual 0.8."""
_SHINGLE = 5
_PROMPT_EDITS = ("{} Thanks.", "Please: {}", "So: {}", "{} Explain.", "{} .", "{}..", "{}!")
_RESPONSE_EDITS = ("{} That is all.", "So {}", "Sure: {}", "{} .", "{}..", "{}!")
_NUMBER = re.compile(r"\d{1,18}")
_SHIFTS = (1, 2, 3, 5, 7, 10, 20)
_LOOP_WORDS = 12
_LOOPED_WORDS = 200
_LOOP_CHARACTERS = 4000
"""Words of a loop: at most `_LOOP_WORDS` a turn, about `_LOOPED_WORDS` in all."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Canary:
    """A planted row.

    Attributes:
        kind: A key of `DEFECTS`.
        source_id: The row it was made from.
        row: Columns of `schema.ROW`.
    """

    kind: str
    source_id: str
    row: dict[str, Any]


def _choice(size: int, kind: str, row: Row, what: str = "") -> int:
    return hash64("canary", kind, row["id"], what) % size


def _remade(row: Row, messages: list[dict[str, Any]]) -> dict[str, Any]:
    return schema.make_row(
        messages,
        **{
            name: row[name]
            for name in ("answer", "answer_from", "source", "conversation_id", "tools")
        },
    )


def _with_response(row: Row, text: str) -> dict[str, Any] | None:
    """The row with another response; None where that changes nothing or leaves nothing."""
    last = row["messages"][-1]
    changed = schema.message(last["role"], text)
    if not changed["content"] or changed["content"] == last["content"]:
        return None
    return _remade(row, [*row["messages"][:-1], changed])


def _with_prompt(row: Row, text: str) -> dict[str, Any] | None:
    """The row with another last user message; None where it has none."""
    before = list(row["messages"][:-1])
    if not before or before[-1]["role"] != "user" or not before[-1]["content"]:
        return None
    before[-1] = schema.message("user", text)
    return _remade(row, [*before, row["messages"][-1]])


def _response(row: Row) -> str:
    return row["messages"][-1]["content"] or ""


def _prompt(row: Row) -> str:
    return (row["messages"][-2]["content"] or "") if len(row["messages"]) > 1 else ""


def swapped_answer(row: Row, partner: Row) -> dict[str, Any] | None:
    """The response of another prompt; None where the partner says the same, or answers the same.

    Multiple choice has few answers: another prompt's response is often right, and is no defect.
    """
    if partner["prompt_id"] == row["prompt_id"]:
        return None
    known = (row["answer"], partner["answer"])
    if None not in known and len({answer_key(answer) for answer in known}) == 1:
        return None
    if words(_response(partner)) == words(_response(row)):
        return None
    return _with_response(row, _response(partner))


def truncated(row: Row, partner: Row) -> dict[str, Any] | None:
    """The response cut somewhere in its second half; None below eight characters."""
    text = _response(row)
    if len(text) < 8:
        return None
    half = len(text) // 2
    return _with_response(row, text[: half + _choice(len(text) - half, "truncated", row)])


def looped(row: Row, partner: Row) -> dict[str, Any] | None:
    """The response with its last words over and over, as a sampler that finds no end writes it.

    None where they are no words: two hundred copies of a megabyte are no loop that anybody meets.
    """
    words = _response(row).split()
    if not words:
        return None
    tail = words[-1 - _choice(_LOOP_WORDS, "looped", row) :]
    if sum(map(len, tail)) > _LOOP_CHARACTERS:
        return None
    times = -(-_LOOPED_WORDS // len(tail))
    return _with_response(row, " ".join([_response(row), *tail * times]))


def _shifted(text: str, kind: str, row: Row) -> str | None:
    """One number of the text made larger."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    chosen = numbers[_choice(len(numbers), kind, row)]
    larger = int(chosen[0]) + _SHIFTS[_choice(len(_SHIFTS), kind, row, "shift")]
    return text[: chosen.start()] + str(larger) + text[chosen.end() :]


def one_number(row: Row, partner: Row) -> dict[str, Any] | None:
    """One number of the response is larger than it was; None where there is none."""
    text = _shifted(_response(row), "one_number", row)
    return _with_response(row, text) if text else None


def other_question(row: Row, partner: Row) -> dict[str, Any] | None:
    """One number of the prompt is larger: another question, and no copy of the row."""
    text = _shifted(_prompt(row), "other_question", row)
    return _with_prompt(row, text) if text else None


def near_copy(row: Row, partner: Row) -> dict[str, Any] | None:
    """The row with words put before or after both texts, each still `CLOSE` to what it was."""
    response = _close_edit(_response(row), _RESPONSE_EDITS, row)
    changed = _with_response(row, response) if response else None
    if changed is None or len(row["messages"]) == 1:
        return changed
    prompt = _close_edit(_prompt(row), _PROMPT_EDITS, row)
    return _with_prompt(changed, prompt) if prompt else None


def leaked(row: Row, partner: Row) -> dict[str, Any] | None:
    """An evaluation row as a pool row, its prompt reworded at the ends."""
    edit = _PROMPT_EDITS[_choice(len(_PROMPT_EDITS), "leaked", row)]
    return _with_prompt(row, edit.format(_prompt(row)))


def gold_answer(row: Row, partner: Row) -> dict[str, Any] | None:
    """A sound row by construction: the independent answer itself, marked as final."""
    if row["answer"] is None or row["answer_from"] != "independent":
        return None
    return _with_response(row, f"The answer follows.\n#### {row['answer']}")


DEFECTS: dict[str, Callable[[Row, Row], dict[str, Any] | None]] = {
    "swapped_answer": swapped_answer,
    "truncated": truncated,
    "looped": looped,
    "one_number": one_number,
    "near_copy": near_copy,
    "leaked": leaked,
    "other_question": other_question,
    "gold_answer": gold_answer,
}
"""How each kind is made of a row and a partner, the row drawn after it."""

SOUND = frozenset({"other_question", "gold_answer", "proven"})
"""Kinds that a gate should keep: removing one is a false drop. Proven rows are real ones."""


def _close_edit(text: str, edits: tuple[str, ...], row: Row) -> str | None:
    start = _choice(len(edits), "near_copy", row)
    for edit in edits[start:] + edits[:start]:
        if similarity(text, edit.format(text)) >= CLOSE:
            return edit.format(text)
    return None


def similarity(left: str, right: str) -> float:
    """Jaccard similarity of the 5-character shingles of two texts, case and spacing folded."""
    a, b = (_shingles(words(text)) for text in (left, right))
    return len(a & b) / len(a | b)


def _shingles(text: str) -> set[str]:
    return {text[i : i + _SHINGLE] for i in range(max(1, len(text) - _SHINGLE + 1))}


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
