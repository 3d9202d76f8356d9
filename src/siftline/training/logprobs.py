"""The one differentiable primitive of training: log-probabilities of targets, token by token.

Logits are the largest tensor of a pass. `token_scores` makes them in tiles of positions, in the
forward and again in the backward pass, so memory holds one tile, whatever the batch and the
vocabulary; few enough logits are kept instead of made twice. With a reference model it also gives
the divergence from that model over the full vocabulary, in the same walk.

`read_tokens` makes a causal language model hand over the hidden states of its labelled positions
and nothing else. It is a mode of the model's own forward pass, so that DDP, FSDP and peft wrap it
as they wrap any other.
"""

import functools
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

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
