"""Training objectives as small functions of per-token log-probabilities.

    sft     -log p, per token
    sft_kl  -log p + w KL(start, model), per token
    dft     -sg[p] log p, per token (dynamic fine-tuning, arXiv 2508.05629)
    asft    dft + w KL(start, model), per token (anchored fine-tuning, arXiv 2509.23753)
    poft    -log sigma(r - r_ref), per row, r its mean log-probability (arXiv 2412.12865)

sg is stop-gradient, KL is over the full vocabulary with the reference first. Per-token losses are
averaged over the loss tokens of a whole optimizer step, per-row losses over its rows: what a device
or a forward pass holds has no say.

The one differentiable primitive of training: log-probabilities of targets, token by token.
"""

import functools
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from siftline.scoring.projection import Head, head_of
from siftline.training.schedule import IGNORED

TILE_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""Bytes of the logits of one tile in float32, by kind of device."""
KEPT_BYTES = 256 << 20
"""Up to this many bytes of logits are kept for the backward pass."""


@dataclass(frozen=True)
class States:
    """What a model says at labelled positions, before its head.

    Attributes:
        hidden: Last hidden states, shape (n, H); rows of the batch follow each other.
        head: The map from them to logits.
        targets: Token ids to predict, shape (n,).
        balance: The load-balancing loss of a mixture of experts, or None.
    """

    hidden: torch.Tensor
    head: Head
    targets: torch.Tensor
    balance: torch.Tensor | None = None


Reader = Callable[[States], Any]


def read_tokens(model: Any) -> None:
    """Adds a mode to a causal language model's forward pass, in place.

    `model(..., labels=labels, reader=f)` returns `f(States)` of the positions whose next label is
    not -100. Without `reader` nothing changes.
    """
    plain = model.forward
    text = model.config.get_text_config()

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, reader: Reader | None = None, **kwargs: Any) -> Any:
        if reader is None:
            return plain(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs["use_cache"] = False
        routed = bool(getattr(text, "output_router_logits", False))
        if routed:
            kwargs["output_router_logits"] = True
        output = self.base_model(*args, **kwargs)
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        balance = _balance(self, text, output, kwargs.get("attention_mask")) if routed else None
        return reader(
            States(output.last_hidden_state[:, :-1][wanted], _head(self), targets[wanted], balance)
        )

    model.forward = types.MethodType(forward, model)


def _head(model: Any) -> Head:
    """The head with its weights as parameters, gathered where FSDP 2 shards them."""
    from torch.distributed.tensor import DTensor

    module = model.get_output_embeddings()
    if hasattr(module, "modules_to_save"):  # peft trains a copy of it
        off = module.disable_adapters
        module = (
            module.original_module if off else module.modules_to_save[module.active_adapters[0]]
        )
    weight, bias = (
        part.full_tensor() if isinstance(part, DTensor) else part
        for part in (module.weight, module.bias)
    )
    known = head_of(module, model.config.get_text_config())
    return Head(weight, bias, known.scale, known.softcap)


def _balance(model: Any, text: Any, output: Any, attention_mask: Any) -> torch.Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    loss = load_balancing_loss_func(
        output.router_logits, experts, text.num_experts_per_tok, attention_mask
    )
    return torch.as_tensor(loss)


@dataclass(frozen=True)
class TokenScores:
    """Per target: its log-probability, and KL(reference || model) over the full vocabulary.

    Attributes:
        logprobs: In nats, differentiable, shape (n,).
        kl: In nats, differentiable, shape (n,); None without a reference.
    """

    logprobs: torch.Tensor
    kl: torch.Tensor | None = None


def token_scores(states: States, reference: States | None = None) -> TokenScores:
    """Log-probabilities of targets, and how far the model is from a reference.

    Args:
        states: Of the model; gradients flow to its hidden states and its head's weights.
        reference: Of the frozen reference, at the same positions.

    Returns:
        float32 scores (float64 of float64 states).
    """
    head = states.head
    other = None if reference is None else (reference.hidden.detach(), reference.head)
    logprobs, kl = _Walk.apply(states.hidden, head.weight, head.bias, states.targets, head, other)
    return TokenScores(logprobs, None if reference is None else kl)


def _cast(hidden: torch.Tensor, head: Head) -> tuple[torch.Tensor, Head]:
    """Both in the type that products are taken in: autocast's where it is on, else the states'."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    return hidden.detach().to(dtype), Head(
        head.weight.detach().to(dtype), bias, head.scale, head.softcap
    )


def _log_softmax(head: Head, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and their log-softmax, shape (rows, V) each, in float32 or above."""
    raw = torch.nn.functional.linear(hidden, head.weight, head.bias)
    logits = raw if raw.dtype == torch.float64 else raw.float()
    if head.scale != 1.0:
        logits = logits * head.scale
    if head.softcap is not None:
        logits = (logits / head.softcap).tanh() * head.softcap
    return logits, logits.log_softmax(dim=1)


class _Walk(torch.autograd.Function):
    """Walks over tiles of positions; the arguments are those of `token_scores`, taken apart."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        head: Head,
        reference: tuple[torch.Tensor, Head] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h, cast = _cast(hidden, head)
        ref = None if reference is None else _cast(*reference)
        kind, entries = hidden.device.type, len(weight)
        rows = max(1, TILE_BYTES.get(kind, TILE_BYTES["cuda"]) // (4 * entries))
        parts = [slice(i, i + rows) for i in range(0, len(h), rows)]
        keep = any(ctx.needs_input_grad) and 4 * len(h) * entries <= KEPT_BYTES
        out = torch.float64 if h.dtype == torch.float64 else torch.float32
        logprobs = h.new_empty(len(h), dtype=out)
        kl = torch.zeros_like(logprobs)
        kept = []
        with _no_autocast(kind):
            for part in parts:
                tile = _tile(h[part], cast, None if ref is None else (ref[0][part], ref[1]))
                logprobs[part] = tile[1].gather(1, targets[part, None])[:, 0]
                if tile[2] is not None:
                    kl[part] = (tile[2].exp() * (tile[2] - tile[1])).sum(dim=1)
                kept.append(tile if keep else None)
        ctx.save_for_backward(h, targets)
        ctx.cast, ctx.ref, ctx.parts, ctx.kept = cast, ref, parts, kept
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return logprobs, kl

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        by_logprob, by_kl = grads
        h, targets = ctx.saved_tensors
        cast, ref = ctx.cast, ctx.ref
        exact = by_logprob.dtype
        d_hidden = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        d_weight = d_bias = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(cast.weight, dtype=exact)
        if ctx.needs_input_grad[2]:
            d_bias = torch.zeros_like(cast.bias, dtype=exact)
        with _no_autocast(h.device.type):
            for part, kept in zip(ctx.parts, ctx.kept, strict=True):
                # The graph may be walked again, as with retain_graph: nothing kept is written to.
                tile = kept or _tile(h[part], cast, None if ref is None else (ref[0][part], ref[1]))
                grad = _by_logits(tile, cast, targets[part], by_logprob[part], by_kl[part])
                grad = grad.to(h.dtype)
                if d_hidden is not None:
                    d_hidden[part] = grad @ cast.weight
                if d_weight is not None:
                    d_weight += grad.t() @ h[part]
                if d_bias is not None:
                    d_bias += grad.sum(dim=0)
        of_hidden, of_weight, of_bias = ctx.types
        return (
            None if d_hidden is None else d_hidden.to(of_hidden),
            None if d_weight is None else d_weight.to(of_weight),
            None if d_bias is None else d_bias.to(of_bias),
            None,
            None,
            None,
        )


def _no_autocast(kind: str) -> Any:
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


Tile = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]


def _tile(hidden: torch.Tensor, head: Head, reference: tuple[torch.Tensor, Head] | None) -> Tile:
    """Logits (only where a cap needs them again), log-softmax, and the reference's log-softmax."""
    logits, logs = _log_softmax(head, hidden)
    others = None if reference is None else _log_softmax(reference[1], reference[0])[1]
    return logits if head.softcap is not None else None, logs, others


def _by_logits(
    tile: Tile,
    head: Head,
    targets: torch.Tensor,
    by_logprob: torch.Tensor,
    by_kl: torch.Tensor,
) -> torch.Tensor:
    """Gradient by the head's raw product: of log p it is onehot - p, of KL(q || p) it is p - q."""
    logits, logs, others = tile
    grad = logs.exp()
    grad *= (by_kl - by_logprob if others is not None else -by_logprob)[:, None]
    if others is not None:
        grad -= others.exp() * by_kl[:, None]
    grad.scatter_add_(1, targets[:, None], by_logprob[:, None])
    if logits is not None and head.softcap is not None:
        grad *= 1 - (logits / head.softcap) ** 2
    if head.scale != 1.0:
        grad *= head.scale
    return grad


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
