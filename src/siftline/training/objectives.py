"""Training objectives as small functions of per-token log-probabilities.

    sft     -log p, per token
    sft_kl  -log p + w KL(start, model), per token
    dft     -sg[p] log p, per token (dynamic fine-tuning, arXiv 2508.05629)
    asft    dft + w KL(start, model), per token (anchored fine-tuning, arXiv 2509.23753)
    poft    -log sigma(r - r_ref), per row, r its mean log-probability (arXiv 2412.12865)

sg is stop-gradient, KL is over the full vocabulary with the reference first. Per-token losses are
averaged over the loss tokens of a whole optimizer step, per-row losses over its rows: what a device
or a forward pass holds has no say.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from siftline.training.logprobs import TokenScores

Kind = Literal["sft", "sft_kl", "dft", "asft", "poft"]
KINDS = get_args(Kind)
ANCHORED = ("sft_kl", "asft")
"""Objectives that need the frozen start beside the model."""


def sft(logprobs: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token, shape (n,)."""
    return -logprobs


def dft(logprobs: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token times its own probability, held fixed; shape (n,)."""
    return -logprobs * logprobs.detach().exp()


def anchored(losses: torch.Tensor, kl: torch.Tensor, weight: float) -> torch.Tensor:
    """Token losses plus the weighted divergence from the frozen start, shape (n,)."""
    return losses + weight * kl


def row_means(logprobs: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Mean log-probability of each row's tokens.

    Args:
        logprobs: Shape (n,).
        rows: Which row each token is of, int64 from 0, shape (n,).
        count: Rows; each has a token.

    Returns:
        Shape (count,).
    """
    sums = logprobs.new_zeros(count).index_add(0, rows, logprobs)
    return sums / torch.bincount(rows, minlength=count)


def poft(means: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Preference of the model's mean log-probability over the references', shape (rows,).

    Its gradient is that of the length-normalised cross-entropy times sigma(r_ref - r): rows that
    the references find likely and the model does not weigh most.
    """
    return torch.nn.functional.softplus(references - means)


@dataclass(frozen=True)
class Lesson:
    """What an objective needs to know of the tokens of one forward pass besides their scores.

    Attributes:
        weights: Loss weight of each token, shape (n,).
        rows: Which row of the pass each token is of, int64, shape (n,).
        row_weights: Loss weight of each row, shape (rows,).
        references: Mean log-probability of each row under the reference models, shape (rows,).
    """

    weights: torch.Tensor
    rows: torch.Tensor
    row_weights: torch.Tensor
    references: torch.Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """Sums over a pass; means are made over the whole optimizer step.

    Attributes:
        loss: Differentiable, to be divided by the step's sum of weights.
        sums: Further columns of the curve: name to a sum of the same kind, without gradient.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """An objective with its options.

    Attributes:
        kind: See the module's table.
        kl_weight: Of the divergence in `ANCHORED` objectives.
    """

    kind: Kind = "sft"
    kl_weight: float = 0.05

    @property
    def by_row(self) -> bool:
        """Whether losses are of rows, not of tokens."""
        return self.kind == "poft"

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reports beside the loss."""
        if self.kind == "sft":
            return ()
        kl = ("kl",) if self.kind in ANCHORED else ()
        return ("ce", *kl, *(() if self.kind == "sft_kl" else ("mean_weight",)))

    def __call__(self, scores: TokenScores, lesson: Lesson) -> Outcome:
        """Loss and reported sums of one forward pass."""
        losses, emphasis, weights = self._losses(scores, lesson)
        told = {}
        if "ce" in self.columns:
            told["ce"] = -(scores.logprobs.detach() * lesson.weights).sum()
        if scores.kl is not None:
            told["kl"] = (scores.kl.detach() * lesson.weights).sum()
        if emphasis is not None:
            told["mean_weight"] = (emphasis.detach() * weights).sum()
        return Outcome((losses * weights).sum(), told)

    def _losses(
        self, scores: TokenScores, lesson: Lesson
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Losses, the weight each gives its cross-entropy, and their own loss weights."""
        logprobs = scores.logprobs
        if self.kind == "poft":
            assert lesson.references is not None
            means = row_means(logprobs, lesson.rows, len(lesson.row_weights))
            tau = torch.sigmoid(lesson.references - means)
            return poft(means, lesson.references), tau, lesson.row_weights
        damped = self.kind in ("dft", "asft")
        losses = dft(logprobs) if damped else sft(logprobs)
        if self.kind in ANCHORED:
            assert scores.kl is not None
            losses = anchored(losses, scores.kl, self.kl_weight)
        return losses, logprobs.exp() if damped else None, lesson.weights
