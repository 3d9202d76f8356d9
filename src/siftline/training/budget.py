"""Loss tokens: counting them, and laying out the rows one training run will see, step by step.

Arms are compared at equal loss tokens and equal steps (DESIGN section 8), so both are fixed before
training: `rows_for_budget` says which rows a run sees, in which order, and `plan_steps` cuts that
sequence into a given number of steps of nearly equal loss tokens. Both depend on ids and seed only,
never on the order in which the rows arrived.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.kernels.draws import uniforms
from siftline.rows.native import native_message
from siftline.rows.selection import DECISION

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
            (`scoring.omissions`), `empty_response`, `not_a_conversation` (no message, or the last
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
