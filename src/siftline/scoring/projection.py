"""The step from hidden states to the vocabulary, and what is read off its distributions.

A vocabulary makes logits the largest tensor of a pass: 16,384 positions of 150,000 entries are
10 GB in float32. `scored` walks the weights in tiles of positions x entries and keeps a running
maximum and running sums (the online softmax of Milakov and Gimelshein 2018, arXiv 1805.02867), so
its memory depends neither on the batch nor on the vocabulary. On a CPU the tile stays in the cache
and its memory is asked for once, which is worth more than any fused kernel: fresh pages cost as
much as the product. `scored_in_full` is the same by definition, for tests and benchmarks.
"""

from dataclasses import dataclass
from typing import Any

import torch

TILES = {"cpu": (1024, 1024), "cuda": (1024, 32768)}
"""Positions and vocabulary entries projected at once, by kind of device: 4 MiB of float32, which a
CPU keeps in its cache, and 128 MiB, which fills a card; its rounds cost a launch each."""
LEAST = -1e4
"""Logits this far below the largest have probability 0 in float32; keeps 0 x -inf out of sums."""


@dataclass(frozen=True)
class Head:
    """A linear map to the vocabulary, and what some architectures do to its logits.

    Attributes:
        weight: Shape (V, H), in the model's dtype. Products are rounded to that dtype, as in the
            model itself; everything behind them is float32.
        bias: Shape (V,), or None.
        scale: Factor of the logits (Cohere, Granite).
        softcap: Bound c of c tanh(logit / c) (Gemma 2), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits, shape (n, V), of hidden states, shape (n, H)."""
        return self._changed(torch.nn.functional.linear(hidden, self.weight, self.bias).float())

    def tile(self, hidden: torch.Tensor, start: int, end: int, out: torch.Tensor) -> torch.Tensor:
        """float32 logits of entries start to end, shape (n, end - start), written into `out`."""
        weight = self.weight[start:end].t()
        if hidden.dtype == out.dtype:
            torch.mm(hidden, weight, out=out)
            if self.bias is not None:
                out += self.bias[start:end]
        else:
            bias = None if self.bias is None else self.bias[start:end]
            out.copy_(torch.nn.functional.linear(hidden, weight.t(), bias))
        return self._changed(out)

    def _changed(self, logits: torch.Tensor) -> torch.Tensor:
        """Scales and caps fresh logits in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def head_of(module: Any, config: Any) -> Head:
    """The head of a model with output embeddings `module`.

    Raises:
        ValueError: if the module is not a plain linear layer.
    """
    if not isinstance(module, torch.nn.Linear) or not module.weight.is_floating_point():
        raise ValueError(
            f"the model's output layer is {type(module).__name__}, not a plain linear layer: "
            "use the vllm engine"
        )
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is None and getattr(config, "logits_scaling", None):  # Granite
        scale = 1 / config.logits_scaling
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = None if module.bias is None else module.bias.detach()
    return Head(module.weight.detach(), bias, 1.0 if scale is None else scale, softcap)


def scored(
    head: Head,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    details: bool = False,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Log-probabilities of targets, and the statistics of their distributions.

    Args:
        head: The map to the vocabulary.
        hidden: Last hidden states, shape (n, H).
        targets: Token ids, shape (n, k).
        details: Whether entropy and top-1 hits are wanted too.
        tile: Positions and entries at once; by default `TILES` of the device.

    Returns:
        float32, shape (n, k), in nats. With details (n, k + 2): then come the entropy, in nats, and
        1 where the first target is as likely as any token.
    """
    rows, entries = tile or TILES.get(hidden.device.type, TILES["cuda"])
    rows, entries = min(rows, len(hidden)), min(entries, len(head.weight))
    space = hidden.new_empty((1 + details, rows * entries), dtype=torch.float32)
    width = targets.shape[1] + 2 * details
    out = hidden.new_empty((len(hidden), width), dtype=torch.float32)
    for start in range(0, len(hidden), max(rows, 1)):
        part = slice(start, start + rows)
        out[part] = _tile_of_rows(head, hidden[part], targets[part], space, entries)
    return out


def _tile_of_rows(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, space: torch.Tensor, entries: int
) -> torch.Tensor:
    """`scored` for one tile of positions, one vocabulary tile after the other.

    `space` has one row to write logits to, and a second if details are wanted.
    """
    n = len(hidden)
    top = space.new_full((n, 1), torch.finfo(torch.float32).min)
    total, moment = torch.zeros_like(top), torch.zeros_like(top)
    picked = space.new_full(targets.shape, -torch.inf)
    for start in range(0, len(head.weight), entries):
        end = min(start + entries, len(head.weight))
        first, *second = (line[: n * (end - start)].view(n, end - start) for line in space)
        logits = head.tile(hidden, start, end, first)
        own = logits.gather(1, (targets - start).clamp_(0, end - start - 1))
        picked = torch.where((targets >= start) & (targets < end), own, picked)
        above = torch.maximum(top, logits.amax(dim=1, keepdim=True))
        shift, shrink = top - above, (top - above).exp_()
        logits.sub_(above)
        if second:
            # Of e^x and x e^x, x below 0: sums of one sign, so the entropy loses no digits.
            weights = torch.exp(logits.clamp_(min=LEAST), out=second[0])
            moment = (moment + total * shift) * shrink
            total = total * shrink + weights.sum(dim=1, keepdim=True)
            moment += weights.mul_(logits).sum(dim=1, keepdim=True)
        else:
            total = total * shrink + logits.exp_().sum(dim=1, keepdim=True)
        top = above
    spread = total.log()
    logprobs = picked - top - spread
    if len(space) == 1:
        return logprobs
    return torch.cat([logprobs, spread - moment / total, (picked[:, :1] >= top).float()], dim=1)


def scored_in_full(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What `scored` gives with details, by the definitions, with all logits at once in float64."""
    logprobs = head.logits(hidden).double().log_softmax(dim=1)
    entropy = torch.special.entr(logprobs.exp()).sum(dim=1, keepdim=True)
    picked = logprobs.gather(1, targets)
    hit = picked[:, :1] >= logprobs.amax(dim=1, keepdim=True)
    return torch.cat([picked, entropy, hit], dim=1).float()
