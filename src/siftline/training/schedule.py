"""Every forward pass of a run, laid out before it starts.

Loss tokens: counting them, and laying out the rows one training run will see, step by step.

Phases of a run: which sources it sees in which order.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.kernels.draws import largest_remainder, uniforms
from siftline.rows.native import native_message
from siftline.rows.selection import DECISION
from siftline.scoring.engines.batching import plan_batches
from siftline.selectors.spending import REST, check_mixture, split

STAGE = "training order"


@dataclass(frozen=True)
class TokenRows:
    """Rows as a trainer takes them, one long array instead of a list per row.

    Attributes:
        ids: n ids.
        tokens: Token ids of all rows, int32, shape (total,).
        offsets: Row i is tokens[offsets[i]:offsets[i + 1]]; int64, shape (n + 1,).
        starts: First position of the response within its row, shape (n,); it ends with the row.
        skipped: Rows that can't be trained on, in the columns of `selection.DECISION`: `too_long`
            (value and threshold in tokens), `template_error`, what the template leaves out
            (`scoring.templates`), `empty_response`, `not_a_conversation` (no message, or the last
            one is not the assistant's).
        trimmed: Rows whose response lost white space around it to the template.
    """

    ids: list[str]
    tokens: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    skipped: pl.DataFrame
    trimmed: int = 0

    @property
    def loss_tokens(self) -> np.ndarray:
        """Tokens of each response, end of sequence included; int64, shape (n,)."""
        return np.diff(self.offsets) - self.starts

    def row(self, position: int) -> tuple[np.ndarray, int]:
        """Token ids of one row, and where its response starts."""
        first, last = self.offsets[position : position + 2]
        return self.tokens[first:last], int(self.starts[position])


def _skip(identity: str, reason: str, value: float | None, limit: float | None) -> dict[str, Any]:
    return {
        "id": identity,
        "kept": False,
        "reason": reason,
        "value": value,
        "threshold": limit,
        "matched_id": None,
    }


def _empty(message: Mapping[str, Any]) -> bool:
    said = native_message(message)
    return not any(said.get(key) for key in ("content", "reasoning_content", "tool_calls"))


def _conversation(turns: Sequence[Mapping[str, Any] | None] | None) -> bool:
    """Whether every message has a role, and the last one is the assistant's."""
    if not turns or not all(turn and turn["role"] for turn in turns):
        return False
    last = turns[-1]
    assert last is not None
    return bool(last["role"] == "assistant")


def tokenize_rows(
    rows: pa.Table, tokenizer: Any, max_length: int, template: str | None = None
) -> TokenRows:
    """Templates and tokenises rows; the span is the one scoring uses.

    Args:
        rows: Table with `id` and `messages` (and `tools`, if there); ids distinct.
        tokenizer: A fast transformers tokenizer.
        max_length: Rows with more tokens are skipped, never cut: a cut row has no end to learn.
        template: Jinja chat template; None takes the tokenizer's, else QUESTION_ANSWER.

    Raises:
        ValueError: if an id comes twice, or no row is left.
    """
    from siftline.scoring.spans import UnscorableRow, response_span, trimmed

    ids: list[str] = rows.column("id").to_pylist()
    if len(set(ids)) != len(ids):
        raise ValueError(
            f"{len(ids) - len(set(ids))} ids come twice: training data has one row an id"
        )
    tools = rows.column("tools").to_pylist() if "tools" in rows.column_names else [None] * len(ids)
    kept: list[str] = []
    arrays: list[np.ndarray] = []
    starts: list[int] = []
    skipped: list[dict[str, Any]] = []
    shorter = 0
    for identity, messages, tool in zip(ids, rows.column("messages"), tools, strict=True):
        turns = messages.as_py()
        if not _conversation(turns):
            skipped.append(_skip(identity, "not_a_conversation", None, None))
            continue
        if _empty(turns[-1]):
            skipped.append(_skip(identity, "empty_response", None, None))
            continue
        try:
            tokens, (start, _) = response_span(
                tokenizer, turns, template, tools=tool, max_length=max_length
            )
        except UnscorableRow as error:
            limit = max_length if error.reason == "too_long" else None
            skipped.append(_skip(identity, error.reason, error.tokens, limit))
            continue
        kept.append(identity)
        arrays.append(np.array(tokens, dtype=np.int32))
        starts.append(start)
        shorter += trimmed(tokenizer, turns, template)
    if not kept:
        raise ValueError(f"none of {len(ids)} rows can be trained on ({_reasons(skipped)})")
    return TokenRows(
        ids=kept,
        tokens=np.concatenate(arrays),
        offsets=np.cumsum([0, *map(len, arrays)], dtype=np.int64),
        starts=np.array(starts, dtype=np.int64),
        skipped=pl.DataFrame(skipped, schema=DECISION).sort("id"),
        trimmed=shorter,
    )


def _reasons(skipped: Sequence[Mapping[str, Any]]) -> str:
    """Why rows were skipped; what is too long says how long the shortest of it is."""
    reasons = sorted({line["reason"] for line in skipped})
    long = [line for line in skipped if line["reason"] == "too_long"]
    if not long:
        return ", ".join(reasons)
    shortest = min(int(line["value"]) for line in long)
    return (
        f"{', '.join(reasons)}; the shortest too long has {shortest} tokens, max_length is "
        f"{long[0]['threshold']}: raise it"
    )


def epoch_order(ids: Sequence[str], seed: int, epoch: int) -> np.ndarray:
    """Positions of all ids in the order of one epoch, int64, shape (n,)."""
    return np.lexsort((np.asarray(ids), uniforms(seed, STAGE, ids, epoch)))


def rows_for_budget(
    ids: Sequence[str], loss_tokens: np.ndarray, budget: int, seed: int
) -> list[str]:
    """The rows a run sees, in order, until the budget of loss tokens is met.

    Epochs follow each other, each in an order of its own. The row that would exceed the budget is
    left out and ends the sequence, so a run falls short by less than one row.

    Args:
        ids: n distinct ids.
        loss_tokens: Loss tokens of each, at least 1, shape (n,).
        budget: Most loss tokens in all.
        seed: Seed of the orders.

    Returns:
        Ids, each as often as it is seen.

    Raises:
        ValueError: if there is no row, or the budget is below the first row.
    """
    sizes = np.asarray(loss_tokens, dtype=np.int64)
    if not len(ids) or len(ids) != len(sizes) or sizes.min() < 1:
        raise ValueError(f"{len(ids)} ids, {len(sizes)} sizes: give each row 1 loss token or more")
    sequence: list[str] = []
    left, epoch = budget, 0
    while True:
        order = epoch_order(ids, seed, epoch)
        fits = int(np.searchsorted(np.cumsum(sizes[order]), left, side="right"))
        sequence += [ids[i] for i in order[:fits]]
        if fits < len(ids):
            break
        left -= int(sizes.sum())
        epoch += 1
    if not sequence:
        raise ValueError(f"the budget of {budget} loss tokens holds no row: raise it")
    return sequence


def rows_for_epochs(ids: Sequence[str], epochs: float, seed: int) -> list[str]:
    """All rows `epochs` times, each epoch in an order of its own; a fraction is cut by rows."""
    total = max(1, round(epochs * len(ids)))
    sequence: list[str] = []
    for epoch in range(-(-total // len(ids))):
        sequence += [ids[i] for i in epoch_order(ids, seed, epoch)]
    return sequence[:total]


def plan_steps(sizes: np.ndarray, steps: int, parts: int = 1) -> list[list[np.ndarray]]:
    """Cuts a sequence of rows into steps of nearly equal loss tokens.

    Step k ends with the row whose middle is the last before k/steps of all loss tokens. Rows keep
    their order. Each step is cut the same way into parts: devices times accumulation.

    Args:
        sizes: Loss tokens of each row of the sequence, shape (n,).
        steps: Optimizer steps.
        parts: Forward passes of a step over all devices.

    Returns:
        For each step, `parts` arrays of positions into the sequence, none empty.

    Raises:
        ValueError: if the sequence has fewer rows than a step needs.
    """
    if len(sizes) < steps * parts:
        raise ValueError(
            f"{len(sizes)} rows can't fill {steps} steps of {parts} forward passes: "
            "lower steps or raise the budget"
        )
    cut = _cut(np.asarray(sizes, dtype=np.int64), steps, parts)
    return [[part + step[0] for part in _cut(sizes[step], parts, 1)] for step in cut]


def _cut(sizes: np.ndarray, pieces: int, least: int) -> list[np.ndarray]:
    """Cuts positions 0..n into pieces of nearly equal total size, `least` rows or more in each."""
    ends = np.cumsum(sizes)
    middles = ends - sizes / 2
    wanted = ends[-1] * np.arange(1, pieces) / pieces
    bounds = np.searchsorted(middles, wanted)
    places = np.arange(1, pieces)
    # Rows beyond the least that must lie before each bound: never falling, so no piece is short.
    spare = np.maximum.accumulate(np.maximum(bounds - least * places, 0))
    bounds = np.minimum(spare, len(sizes) - least * pieces) + least * places
    return np.split(np.arange(len(sizes)), bounds)


PHASE = "phase order"


@dataclass(frozen=True)
class Phase:
    """One phase.

    Attributes:
        sources: Its loss tokens by source, as weights; `*` is every source that no phase names.
        share: Its part of the run's loss tokens, as a weight beside those of the other phases.
    """

    sources: dict[str, float] = field(default_factory=lambda: {REST: 1.0})
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share < float("inf"):
            raise ValueError(f"share is {self.share}: give a number above 0")
        check_mixture(self.sources, "sources")


@dataclass(frozen=True)
class Phased:
    """The rows of a run in the order of its phases.

    Attributes:
        ids: Ids, each as often as it is seen.
        composition: What each phase holds of each source: phase (from 1), source, loss_tokens,
            wanted (loss tokens of its weight) and rows.
    """

    ids: list[str]
    composition: tuple[dict[str, Any], ...]


def rows_for_phases(
    ids: Sequence[str],
    loss_tokens: np.ndarray,
    sources: Sequence[str],
    phases: Sequence[Phase],
    budget: int,
    seed: int,
) -> Phased:
    """The rows a run sees, phase by phase, until the budget of loss tokens is met.

    What a source can't spend to the end (its next row is longer) goes to the next one, so the run
    as a whole falls short by less than one row.

    Args:
        ids: n distinct ids.
        loss_tokens: Loss tokens of each, at least 1, shape (n,).
        sources: Source of each.
        phases: At least one.
        budget: Most loss tokens in all.
        seed: Seed of the orders.

    Raises:
        ValueError: if a phase asks a source that has no row, or the budget holds none.
    """
    names = {name for phase in phases for name in phase.sources} - {REST}
    groups = np.array([source if source in names else REST for source in sources])
    streams: dict[str, Iterator[tuple[int, int]]] = {}
    taken: list[tuple[int, int]] = []
    told: list[dict[str, Any]] = []
    waiting: dict[str, tuple[int, int]] = {}
    left = 0
    shares = np.array([phase.share for phase in phases])
    for number, size in enumerate(largest_remainder(shares, budget).tolist(), 1):
        mine: list[tuple[int, int]] = []
        for name, wanted in _wanted(phases[number - 1], size):
            if name not in streams:
                streams[name] = _endless(ids, _members(groups, name, number), seed)
                waiting[name] = next(streams[name])
            left, spent = left + wanted, []
            while loss_tokens[waiting[name][0]] <= left:
                left -= int(loss_tokens[waiting[name][0]])
                spent.append(waiting[name])
                waiting[name] = next(streams[name])
            mine += spent
            told.append(_composed(number, name, wanted, [i for i, _ in spent], loss_tokens))
        taken += _shuffled(mine, ids, seed)
    if not taken:
        raise ValueError(f"the budget of {budget} loss tokens holds no row: raise it")
    return Phased([ids[i] for i, _ in taken], tuple(told))


def _wanted(phase: Phase, size: int) -> list[tuple[str, int]]:
    return split(phase.sources, size).select("source", "quota").rows()


def _members(groups: np.ndarray, name: str, number: int) -> np.ndarray:
    """Places of a source's rows."""
    found = np.flatnonzero(groups == name)
    if not len(found):
        known = ", ".join(sorted(set(groups.tolist())))
        raise ValueError(
            f"phase {number} asks source {name!r}, of which there is no row: the rows have {known}"
        )
    return found


def _endless(ids: Sequence[str], members: np.ndarray, seed: int) -> Iterator[tuple[int, int]]:
    """Place and epoch of a source's rows, epoch after epoch."""
    own, epoch = [ids[i] for i in members], 0
    while True:
        for place in members[epoch_order(own, seed, epoch)].tolist():
            yield place, epoch
        epoch += 1


def _shuffled(
    rows: Sequence[tuple[int, int]], ids: Sequence[str], seed: int
) -> list[tuple[int, int]]:
    """Rows of one phase by a draw on id and epoch; the draws of two epochs are independent."""
    by_epoch: dict[int, list[int]] = {}
    for place, epoch in rows:
        by_epoch.setdefault(epoch, []).append(place)
    drawn: dict[tuple[int, int], float] = {}
    for epoch, places in by_epoch.items():
        u = uniforms(seed, PHASE, [ids[place] for place in places], epoch).tolist()
        drawn |= {(place, epoch): x for place, x in zip(places, u, strict=True)}
    return sorted(rows, key=lambda row: (drawn[row], ids[row[0]], row[1]))


def _composed(
    number: int, name: str, wanted: int, places: list[int], loss_tokens: np.ndarray
) -> dict[str, Any]:
    return {
        "phase": number,
        "source": name,
        "wanted": wanted,
        "loss_tokens": int(loss_tokens[places].sum()),
        "rows": len(places),
    }


IGNORED = -100
"""Label of a token that carries no loss, as transformers and TRL expect it."""


@dataclass(frozen=True)
class Schedule:
    """A list of forward passes on one device each.

    Attributes:
        rows: The tokenised rows.
        passes: Positions into `rows` for each forward pass. Devices take turns, then comes the next
            pass of the step, then the next step: so a sequential sampler deals items out.
        steps: Optimizer steps.
        composition: What each phase holds (`Phased`), where the run has phases.
    """

    rows: TokenRows
    passes: list[np.ndarray]
    steps: int
    composition: tuple[dict[str, Any], ...] = ()

    def __len__(self) -> int:
        """Forward passes of the run."""
        return len(self.passes)

    def __getitem__(self, number: int) -> list[dict[str, list[int]]]:
        """The rows of one pass: `input_ids`, and `labels` that are the span and nothing else."""
        items = []
        for position in self.passes[number]:
            tokens, start = self.rows.row(int(position))
            labels = [IGNORED] * start + tokens[start:].tolist()
            items.append({"input_ids": tokens.tolist(), "labels": labels})
        return items

    @property
    def seen(self) -> int:
        """Rows seen, repeats included."""
        return sum(len(part) for part in self.passes)

    def tokens_by_step(self) -> np.ndarray:
        """Loss tokens of each optimizer step, int64, shape (steps,)."""
        sizes = self.rows.loss_tokens
        each = np.array([sizes[part].sum() for part in self.passes], dtype=np.int64)
        return each.reshape(self.steps, -1).sum(axis=1)


def epochs_schedule(
    rows: TokenRows, *, epochs: float, batch_rows: int, parts: int, seed: int
) -> Schedule:
    """All rows `epochs` times, in steps of about `batch_rows` rows and `parts` passes each."""
    sequence = rows_for_epochs(rows.ids, epochs, seed)
    return _lay_out(rows, sequence, math.ceil(len(sequence) / batch_rows), parts)


def budget_schedule(
    rows: TokenRows, *, loss_tokens: int, steps: int, parts: int, seed: int
) -> Schedule:
    """A budget of loss tokens in a given number of steps of `parts` passes each."""
    sequence = rows_for_budget(rows.ids, rows.loss_tokens, loss_tokens, seed)
    return _lay_out(rows, sequence, steps, parts)


def phase_schedule(
    rows: TokenRows,
    sources: Sequence[str],
    phases: Sequence[Phase],
    *,
    loss_tokens: int,
    steps: int | None,
    batch_rows: int,
    parts: int,
    seed: int,
) -> Schedule:
    """A budget of loss tokens in phases, in given steps or such of about `batch_rows` rows."""
    found = rows_for_phases(rows.ids, rows.loss_tokens, sources, phases, loss_tokens, seed)
    steps = math.ceil(len(found.ids) / batch_rows) if steps is None else steps
    return replace(_lay_out(rows, found.ids, steps, parts), composition=found.composition)


def length_schedule(rows: TokenRows, max_tokens: int) -> Schedule:
    """All rows once in a single step, those of like length in one pass of few enough tokens."""
    lengths = np.diff(rows.offsets).tolist()
    batches = plan_batches(lengths, rows.ids, max_tokens, len(rows.ids))
    return Schedule(rows, [np.array(batch) for batch in batches], 1)


def _lay_out(rows: TokenRows, sequence: list[str], steps: int, parts: int) -> Schedule:
    place = {identity: position for position, identity in enumerate(rows.ids)}
    order = np.array([place[identity] for identity in sequence])
    plan = plan_steps(rows.loss_tokens[order], steps, parts)
    return Schedule(rows, [order[part] for step in plan for part in step], steps)
