"""Every forward pass of a run, laid out before it starts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from siftline.scoring.engines.batching import plan_batches
from siftline.training.budget import TokenRows, plan_steps, rows_for_budget, rows_for_epochs
from siftline.training.phases import Phase, rows_for_phases

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
        composition: What each phase holds (`phases.Phased`), where the run has phases.
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
