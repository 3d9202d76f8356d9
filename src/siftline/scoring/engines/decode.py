"""Draws text from a causal model, each draw a function of its prompt and seed alone.

Sampling is Gumbel-max: the drawn token is argmax(log p + g), with g from a counter-based hash of
(seed, step, token id). There is no generator whose state depends on the neighbours in the batch, so
a draw repeats whatever it is batched with, up to float rounding of the logits. (vLLM's sampler and
JAX's random bits rest on the same idea; the mixer is splitmix64, Steele et al. 2014.)

All draws start together and step together. Finished ones leave the batch when they are a quarter of
it, so a few long texts do not cost the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from siftline.scoring.engines.base import Generation, Sampling

# The splitmix64 increment and multipliers, written as the signed integers torch has.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
LEAVE_SHARE = 0.25
ROOM = 128
"""Tokens of room a full cache buffer grows by."""


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 on int64 (products wrap; the masks make the shifts logical)."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX_2
    return x ^ ((x >> 31) & (2**33 - 1))


def gumbel_noise(seeds: torch.Tensor, step: int, vocab: int) -> torch.Tensor:
    """Standard Gumbel noise for one step of B draws.

    Args:
        seeds: int64, shape (B,).
        step: Tokens drawn so far.
        vocab: V, the number of tokens.

    Returns:
        float64, shape (B, V), on the device of `seeds`; entry (b, v) is a function of
        (seeds[b], step, v) only.
    """
    tokens = torch.arange(1, vocab + 1, dtype=torch.int64, device=seeds.device)
    advance = ((step + 1) * _GOLDEN + 2**63) % 2**64 - 2**63  # wrapped, as torch wraps its own
    row = _mix(_mix(seeds) + advance)
    bits = _mix(row[:, None] + tokens * _GOLDEN)
    # 53 bits fill a double's mantissa; the half step keeps 0 and 1 out, where log() is infinite.
    uniform = (((bits >> 11) & (2**53 - 1)).double() + 0.5) / 2.0**53
    return uniform.log_().neg_().log_().neg_()


def _outside_nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask of the tokens behind the smallest set of most likely ones that holds `top_p`."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability  # 0 for the first: one always stays
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, before >= top_p)


def choose(
    logits: torch.Tensor, seeds: torch.Tensor, step: int, sampling: Sampling
) -> torch.Tensor:
    """Draws one token a row.

    Args:
        logits: float32, shape (B, V).
        seeds: int64, shape (B,).
        step: Tokens drawn so far.
        sampling: Temperature and top_p.

    Returns:
        int64, shape (B,).
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        logits = logits.masked_fill(_outside_nucleus(logits, sampling.top_p), -torch.inf)
    return (gumbel_noise(seeds, step, logits.shape[-1]) + logits).argmax(dim=-1)


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer in a buffer with room ahead.

    The stock layer concatenates, so every step copies the whole cache.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.buffers: list[torch.Tensor] = []
        self.length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends new states; returns all so far as views, shape (batch, heads, length, dim)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        news = (key_states, value_states)
        total = self.length + key_states.shape[-2]
        if not self.buffers or total > self.buffers[0].shape[-2]:
            grown = [new.new_empty(*new.shape[:2], total + ROOM, new.shape[-1]) for new in news]
            for old, buffer in zip(self.buffers, grown, strict=False):
                buffer[:, :, : self.length] = old[:, :, : self.length]
            self.buffers = grown
        for buffer, new in zip(self.buffers, news, strict=True):
            buffer[:, :, self.length : total] = new
        self.length = total
        self.keys, self.values = (buffer[:, :, :total] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps, repeats or reorders rows of the batch."""
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


def roomy_cache(config: Any) -> DynamicCache:
    """The cache of a model's kind of layers, with the plain attention layers made roomy."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


class Decoder(Protocol):
    """What the loop needs of a model: hidden states with a cache, and the projection."""

    config: Any
    device: torch.device

    def hidden(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Last hidden states, shape (B, T, H)."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits, shape (B, V), of hidden states, shape (B, H)."""
        ...


@dataclass
class _Draw:
    """One text in the making."""

    prompt: Sequence[int]
    seed: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""


class _StopStrings:
    """Says whether the newest token completes a stop string.

    Decodes only the tail, and only after a token that could end one.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.tail = max((len(text.encode()) for text in stop), default=0) + 4
        self.candidates: dict[int, bool] = {}

    def hit(self, tokens: list[int]) -> bool:
        if not self.stop:
            return False
        newest = tokens[-1]
        if newest not in self.candidates:
            text = self.tokenizer.decode([newest])
            # A token of a few bytes of a longer character decodes to U+FFFD: it could end anything.
            self.candidates[newest] = "\ufffd" in text or any(s[-1] in text for s in self.stop)
        if not self.candidates[newest]:
            return False
        text = self.tokenizer.decode(tokens[-self.tail :], skip_special_tokens=True)
        return any(stop in text for stop in self.stop)

    def cut(self, text: str) -> str:
        return text[: min((text.find(s) for s in self.stop if s in text), default=len(text))]


def draw_texts(
    model: Decoder,
    tokenizer: Any,
    draws: Sequence[tuple[Sequence[int], int]],
    sampling: Sampling,
    *,
    ends: frozenset[int],
    max_length: int,
) -> list[Generation]:
    """Draws one text for each (prompt tokens, seed).

    Args:
        model: The model, already in inference mode.
        tokenizer: Its tokenizer.
        draws: n prompts and seeds; draws of one prompt that stand together share its prefill.
        sampling: How to draw.
        ends: Tokens that end a text.
        max_length: Most tokens of prompt and text together; a text stops there for "length".

    Returns:
        n generations in the order of `draws`.
    """
    states = [
        _Draw(prompt, seed, min(sampling.max_new_tokens, max_length - len(prompt)))
        for prompt, seed in draws
    ]
    stops = _StopStrings(tokenizer, sampling.stop)
    with torch.inference_mode():
        _run(model, states, sampling, ends, stops)
    return [_generation(tokenizer, state, ends, stops) for state in states]


def _generation(
    tokenizer: Any, draw: _Draw, ends: frozenset[int], stops: _StopStrings
) -> Generation:
    body = draw.tokens[:-1] if draw.tokens[-1] in ends else draw.tokens
    text = stops.cut(tokenizer.decode(body, skip_special_tokens=True))
    return Generation(text, len(draw.tokens), draw.finish_reason)


def _prefill(
    model: Decoder, draws: list[_Draw]
) -> tuple[torch.Tensor, DynamicCache, torch.Tensor | None, torch.Tensor]:
    """Runs each prompt once, left-padded, then repeats its state for each of its draws.

    Returns:
        Last hidden states (B, H), the cache, the mask of real tokens (B, T) or None when nothing is
        padded, and the position of the next token (B,).
    """
    prompts: list[Sequence[int]] = []
    owner = []
    for i, draw in enumerate(draws):
        if i == 0 or draw.prompt != draws[i - 1].prompt:
            prompts.append(draw.prompt)
        owner.append(len(prompts) - 1)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)
    columns = torch.arange(longest, device=model.device)
    mask = columns >= (longest - lengths)[:, None]
    positions = (columns - (longest - lengths)[:, None]).clamp(min=0)
    padded = not bool(mask.all())
    cache = roomy_cache(model.config)
    hidden = model.hidden(
        ids,
        attention_mask=mask.long() if padded else None,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )[:, -1]
    rows = torch.tensor(owner, device=model.device)
    cache.batch_select_indices(rows)
    return hidden[rows], cache, mask[rows].long() if padded else None, lengths[rows]


def _run(
    model: Decoder,
    draws: list[_Draw],
    sampling: Sampling,
    ends: frozenset[int],
    stops: _StopStrings,
) -> None:
    """Steps all draws until each has a finish reason."""
    hidden, cache, mask, positions = _prefill(model, draws)
    seeds = torch.tensor([draw.seed for draw in draws], device=model.device)
    batch = list(draws)  # what each row of the tensors belongs to, finished ones included
    step = 0
    while True:
        chosen = choose(model.logits(hidden), seeds, step, sampling)
        step += 1
        for draw, token in zip(batch, chosen.tolist(), strict=True):
            if not draw.finish_reason:
                _append(draw, token, ends, stops)
        live = [row for row, draw in enumerate(batch) if not draw.finish_reason]
        if not live:
            return
        if len(live) <= (1 - LEAVE_SHARE) * len(batch):
            rows = torch.tensor(live, device=model.device)
            cache.batch_select_indices(rows)
            chosen, seeds, positions = chosen[rows], seeds[rows], positions[rows]
            mask = None if mask is None else mask[rows]
            batch = [batch[row] for row in live]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
        hidden = model.hidden(
            chosen[:, None],
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
        )[:, -1]
        positions = positions + 1


def _append(draw: _Draw, token: int, ends: frozenset[int], stops: _StopStrings) -> None:
    draw.tokens.append(token)
    if token in ends or stops.hit(draw.tokens):
        draw.finish_reason = "stop"
    elif len(draw.tokens) >= draw.limit:
        draw.finish_reason = "length"
