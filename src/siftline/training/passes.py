"""What the planned forward passes hold: tokens, labels, loss weights, corrupted inputs.

Everything is a function of the plan, the seed and the optimizer step, so a resumed run, another
number of devices and a data loader's worker see the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from siftline.kernels.draws import uniforms
from siftline.training.schedule import IGNORED, Schedule

STAGE = "masked thought"
RAMP = 2 / 3
"""Share of the steps over which the rate of masked thought rises from 0 to its end."""


@dataclass(frozen=True)
class Corruption:
    """Masked thought (arXiv 2403.02178): tokens of the response are swapped in the input alone.

    Attributes:
        rate: Share of response tokens at the end of the ramp.
        vocabulary: Token ids to draw from.
        kept: Token ids never replaced, as the end of sequence.
        seed: Of the draws.
    """

    rate: float
    vocabulary: np.ndarray
    kept: np.ndarray
    seed: int

    def rate_at(self, step: int, steps: int) -> float:
        """The rate at an optimizer step, counted from 0."""
        return self.rate * min(1.0, step / (RAMP * steps))

    def apply(
        self, tokens: np.ndarray, start: int, identity: str, step: int, rate: float
    ) -> np.ndarray:
        """A row's tokens with some from `start` on replaced; the row itself where rate is 0."""
        names = [f"{identity}\x1f{place}" for place in range(start, len(tokens))]
        hit = uniforms(self.seed, STAGE, names, 2 * step) < rate
        hit &= ~np.isin(tokens[start:], self.kept)
        if not hit.any():
            return tokens
        drawn = uniforms(self.seed, STAGE, names, 2 * step + 1) * len(self.vocabulary)
        changed = tokens.copy()
        changed[start:][hit] = self.vocabulary[drawn.astype(np.int64)][hit]
        return changed


def balanced(sources: Sequence[str], tokens: np.ndarray, strength: float) -> np.ndarray:
    """Row weights that even out sources.

    A source with n of N loss tokens weighs (N / n) ** strength, times what makes the mean over all
    loss tokens 1: at strength 1 all sources have equal shares of the loss, at 0 their own.

    Args:
        sources: Source of each row the run sees, repeats included; shape (n,).
        tokens: Loss tokens of each, shape (n,).
        strength: From 0 to 1.

    Returns:
        Weight of each row, shape (n,).
    """
    _, which = np.unique(np.asarray(sources), return_inverse=True)
    shares = np.bincount(which, weights=tokens) / tokens.sum()
    weights = (shares**-strength)[which]
    return weights * (tokens.sum() / (weights * tokens).sum())


@dataclass(frozen=True)
class Passes:
    """The forward passes of a schedule with their loss weights.

    Attributes:
        schedule: The plan.
        row_weights: Loss weight of each of the schedule's rows, shape (n,).
        prompt_weight: Loss weight of prompt tokens; those of the response have 1.
        references: Mean log-probability of each row under the reference models, shape (n,).
        corruption: What is done to the inputs.
    """

    schedule: Schedule
    row_weights: np.ndarray
    prompt_weight: float = 0.0
    references: np.ndarray | None = None
    corruption: Corruption | None = None

    def __len__(self) -> int:
        """Forward passes of the run, over all devices."""
        return len(self.schedule)

    @property
    def parts(self) -> int:
        """Forward passes of an optimizer step, over all devices."""
        return len(self.schedule) // self.schedule.steps

    def step_of(self, number: int) -> int:
        """The optimizer step, from 0, that a pass belongs to."""
        return number // self.parts

    def rate(self, number: int) -> float:
        """The rate of masked thought in a pass."""
        if self.corruption is None:
            return 0.0
        return self.corruption.rate_at(self.step_of(number), self.schedule.steps)

    def row(self, number: int, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Input tokens, labels and the weights of the labelled tokens of one row of a pass."""
        rows = self.schedule.rows
        tokens, start = rows.row(position)
        first = 1 if self.prompt_weight else max(start, 1)  # nothing precedes the first token
        labels = tokens.astype(np.int64)
        labels[:first] = IGNORED
        weights = np.full(len(tokens), self.row_weights[position])
        weights[:start] *= self.prompt_weight
        rate = self.rate(number)
        if rate and self.corruption is not None:
            step = self.step_of(number)
            tokens = self.corruption.apply(tokens, start, rows.ids[position], step, rate)
        return tokens.astype(np.int64), labels, weights[first:]

    def denominators(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums of loss weights of every step, over tokens and over rows; shape (steps,) each."""
        rows = self.schedule.rows
        lengths = np.diff(rows.offsets)
        responses = lengths - np.maximum(rows.starts, 1)
        prompts = np.maximum(rows.starts - 1, 0)
        by_token = self.row_weights * (responses + self.prompt_weight * prompts)
        passes = self.schedule.passes
        return tuple(
            np.array([of[part].sum() for part in passes]).reshape(-1, self.parts).sum(axis=1)
            for of in (by_token, self.row_weights)
        )


def references_of(ids: Sequence[str], given: Mapping[str, float]) -> np.ndarray:
    """Reference scores by row id, shape (n,).

    Raises:
        ValueError: if a row has none, or one that is not a log-probability.
    """
    missing = [identity for identity in ids if identity not in given]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(ids)} rows have no reference score ({missing[0]} is one): "
            "score them with the reference models first"
        )
    scores = np.array([given[identity] for identity in ids], dtype=np.float64)
    wrong = ~np.isfinite(scores) | (scores > 0)
    if wrong.any():
        raise ValueError(
            f"reference score {scores[wrong][0]} of row {ids[int(wrong.argmax())]} is not a mean "
            "log-probability: it must be finite, 0 or below"
        )
    return scores


def allowed_tokens(tokenizer: Any) -> np.ndarray:
    """Ids of all ordinary tokens: what masked thought draws from."""
    special = set(tokenizer.all_special_ids)
    return np.array([i for i in range(len(tokenizer)) if i not in special])
