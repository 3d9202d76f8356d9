"""The embedded engine: a transformers model in this process, on CPU or GPU.

One call is one planned batch, in one forward or, on a CPU, several. The vocabulary is projected
only for scored positions and tile by tile, so nothing of size tokens x vocabulary exists (see
`projection`). Log-softmax is in float32 whatever the dtype.

The budget of a batch is a fixed number of the spec, so that a resumed run plans the same batches on
any machine; where memory does not hold one, it runs in halves (see `batching`).

Rows are padded on the right and the model gets no mask: under causal attention no real token sees
the padding behind it, and unmasked attention takes the fast kernels. That this holds for the loaded
model, and that our projection gives its logits, is checked once at load.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from siftline import scoring as versions
from siftline.scoring.engines.base import (
    DETAILS,
    Detail,
    Failed,
    Generation,
    Inspection,
    ModelSpec,
    Sampling,
    Span,
    by_prompt,
    check_details,
    check_directory,
    check_options,
    check_rows,
    check_spans,
    positions,
    score_options,
)
from siftline.scoring.engines.batching import in_halves, plan_batches
from siftline.scoring.engines.decode import draw_texts
from siftline.scoring.engines.devices import can_share, side_by_side, torch_device
from siftline.scoring.fingerprint import model_fingerprint
from siftline.scoring.projection import Head, head_of, scored
from siftline.scoring.spans import stop_tokens
from siftline.scoring.templates import load_tokenizer

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

PASS_TOKENS = {"cpu": 512}
"""Most padded tokens of one forward, by kind of device; elsewhere a planned batch is one forward.

On a CPU each core has a forward of its own (see `lanes`), whose activations should stay in its
cache. A row above it is a forward alone.
"""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
"""Largest difference of log-probabilities the check at load allows."""


class TransformersEngine:
    """Scores, samples and embeds with a local transformers model. See `engines.Engine`."""

    details = frozenset(DETAILS)

    def __init__(self, spec: ModelSpec) -> None:
        """Loads the model.

        Raises:
            ValueError: if the directory is missing or incomplete, or the model is not a causal
                language model whose logits are a linear map of its last hidden states.
        """
        self.spec = spec
        self.tokenizer = load_tokenizer(spec)
        self.device = torch_device(spec.device)
        model = _load(spec).to(self.device)
        self.config = model.config.get_text_config(decoder=True)
        limit = getattr(self.config, "max_position_embeddings", None) or spec.max_length
        self.max_length = min(spec.max_length, limit)
        self._decoder = model.base_model
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._head: Head | None = head_of(model.get_output_embeddings(), self.config)
        self._ends = stop_tokens(self.tokenizer) | _model_ends(model)
        self._fingerprint: str | None = None
        self._shared = can_share(model)
        self._check(model)
        logger.info("transformers engine on %s in %s: %s", self.device, spec.dtype, spec.path)

    def hidden(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Last hidden states (after the final norm), shape (B, T, H), of token ids (B, T)."""
        options.setdefault("use_cache", False)
        hidden: torch.Tensor = self._decoder(input_ids=ids, **options).last_hidden_state
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits, shape (n, V), of hidden states, shape (n, H)."""
        assert self._head is not None
        return self._head.logits(hidden)

    def score(
        self, tokens: Sequence[Sequence[int]], spans: Sequence[Span]
    ) -> list[np.ndarray | Failed]:
        """Log-probabilities of the tokens in each row's span, float32 (L,) a row.

        Raises:
            ValueError: if a row is longer than `max_length`, a span is not within its row, or the
                model does not know a token.
        """
        return [part.logprobs for part in self._inspect(tokens, spans, frozenset())]

    def inspect(
        self,
        tokens: Sequence[Sequence[int]],
        spans: Sequence[Span],
        wanted: Collection[Detail],
    ) -> list[Inspection | Failed]:
        """`score` with entropy, top-1 hits and the pooled hidden state, from the same pass.

        Raises:
            ValueError: if a row is longer than `max_length` or a span is not within its row.
        """
        check_details("transformers", wanted, self.details)
        return list(self._inspect(tokens, spans, frozenset(wanted)))

    def choices(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Summed log-probability of each option after each prompt, float32 (prompts, options).

        One forward a prompt when every option is one token, else one a pair.
        """
        check_options(options)
        if all(len(option) == 1 for option in options):
            self._usable(prompts)
            check_tokens(options, self._vocabulary)
            targets = [option[0] for option in options]
            parts = self._passes(lambda part: self._next(part, targets), prompts, prompts)
            return np.stack(parts) if parts else np.zeros((0, len(options)), np.float32)
        return score_options(self, prompts, options)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> list[list[Generation | Failed]]:
        """Draws len(seeds[i]) texts for prompt i; all are in the batch at once.

        Raises:
            ValueError: if a prompt leaves no room for an answer.
        """
        self._usable(prompts, room=1)
        flat = [
            (list(prompt), seed) for prompt, own in zip(prompts, seeds, strict=True) for seed in own
        ]
        drawn = self._halving(lambda part: self._draw(part, sampling), flat)
        return by_prompt(drawn, seeds)

    def embed(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """Unit-length mean of last hidden states with weights 1..L, float32 (n, d).

        RDS+ (Ivison et al. 2025, hamishivi/automated-instruction-selection).
        """
        self._usable(tokens)
        rows = self._passes(self._embed, tokens, tokens)
        return np.stack(rows) if rows else np.zeros((0, self.config.hidden_size), np.float32)

    def fingerprint(self) -> str:
        """Hash of model files, adapter, dtype, template, torch's minor version and our version."""
        if self._fingerprint is None:
            release = ".".join(torch.__version__.split(".")[:2])
            self._fingerprint = model_fingerprint(
                self.spec, "transformers", f"torch {release}, engine {versions.TRANSFORMERS}"
            )
        return self._fingerprint

    def close(self) -> None:
        """Frees the model's memory."""
        self._decoder = self._head = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _usable(self, rows: Sequence[Sequence[int]], room: int = 0) -> None:
        if self._decoder is None:
            raise ValueError(f"the engine of {self.spec.path!r} is closed: open a new one")
        check_rows(rows, self.max_length, room)
        check_tokens(rows, self._vocabulary)

    def _padded(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor(
            [[*row, *[0] * (longest - len(row))] for row in rows], device=self.device
        )

    def _scored(
        self, hidden: torch.Tensor, targets: torch.Tensor, details: bool = False
    ) -> np.ndarray:
        """`projection.scored` with this model's head, on the host."""
        assert self._head is not None
        return scored(self._head, hidden, targets, details=details).cpu().numpy()

    def _inspect(
        self, tokens: Sequence[Sequence[int]], spans: Sequence[Span], wanted: frozenset[Detail]
    ) -> list[Inspection]:
        self._usable(tokens)
        check_spans(tokens, spans)
        jobs = list(zip(tokens, spans, strict=True))
        return self._passes(lambda part: self._score(part, wanted), jobs, tokens)

    def _score(
        self, items: Sequence[tuple[Sequence[int], Span]], wanted: frozenset[Detail]
    ) -> list[Inspection]:
        columns = [positions(span) for _, span in items]
        ids = self._padded([tokens for tokens, _ in items])
        row = torch.from_numpy(np.repeat(np.arange(len(items)), [len(c) for c in columns])).to(ids)
        column = torch.from_numpy(np.concatenate(columns)).to(ids)
        states = self.hidden(ids)
        # The state at one position predicts the token at the next.
        hidden, targets = states[row, column - 1], ids[row, column]
        flat = self._scored(hidden, targets[:, None], bool(wanted & {"entropy", "top1"}))
        pooled = self._pooled(states, [len(tokens) for tokens, _ in items], "pooled" in wanted)
        cuts = np.cumsum([len(c) for c in columns])[:-1]
        return [
            Inspection(
                part[:, 0],
                part[:, 1] if "entropy" in wanted else None,
                part[:, 2] > 0 if "top1" in wanted else None,
                vector,
            )
            for part, vector in zip(np.split(flat, cuts), pooled, strict=True)
        ]

    def _next(self, prompts: Sequence[Sequence[int]], targets: list[int]) -> list[np.ndarray]:
        ids = self._padded(prompts)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        hidden = self.hidden(ids)[torch.arange(len(prompts), device=self.device), last]
        wanted = torch.tensor(targets, device=self.device).expand(len(prompts), -1)
        return list(self._scored(hidden, wanted))

    def _draw(
        self, draws: Sequence[tuple[Sequence[int], int]], sampling: Sampling
    ) -> list[Generation]:
        return draw_texts(
            self, self.tokenizer, draws, sampling, ends=self._ends, max_length=self.max_length
        )

    def _embed(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        lengths = [len(row) for row in rows]
        vectors = self._pooled(self.hidden(self._padded(rows)), lengths, True)
        return [vector for vector in vectors if vector is not None]

    def _pooled(
        self, hidden: torch.Tensor, lengths: Sequence[int], wanted: bool
    ) -> list[np.ndarray] | list[None]:
        """Unit-length mean of hidden states (B, T, H) with weights 1..length, padding left out."""
        if not wanted:
            return [None] * len(lengths)
        limits = torch.tensor(lengths, device=self.device)[:, None]
        weights = torch.arange(1, hidden.shape[1] + 1, device=self.device).float()
        weights = weights.expand(len(lengths), -1).masked_fill(weights > limits, 0)
        weights = weights / weights.sum(dim=1, keepdim=True)
        mean = torch.bmm(weights[:, None], hidden.float())[:, 0]
        return list(torch.nn.functional.normalize(mean, dim=1).cpu().numpy())

    def _passes(
        self,
        run: Callable[[Sequence[Item]], list[Result]],
        items: Sequence[Item],
        rows: Sequence[Sequence[int]],
    ) -> list[Result]:
        """Runs a batch in forwards that suit the device; rows[i] are the tokens of items[i]."""
        limit = PASS_TOKENS.get(self.device.type)
        if limit is None or not items:
            return self._halving(run, items)
        names = [f"{i:09}" for i in range(len(items))]
        plan = plan_batches([len(row) for row in rows], names, limit, len(items))
        plan.reverse()  # the longest rows first, so that no core ends long after the others

        def forward(places: list[int]) -> list[Result]:
            return self._halving(run, [items[place] for place in places])

        found = side_by_side(forward, plan) if self._shared else [forward(part) for part in plan]
        out: dict[int, Result] = {}
        for places, part in zip(plan, found, strict=True):
            out |= zip(places, part, strict=True)
        return [out[place] for place in range(len(items))]

    def _halving(
        self, run: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]
    ) -> list[Result]:
        """Runs a batch, in halves where memory runs out."""

        def unrecorded(part: Sequence[Item]) -> list[Result]:
            with torch.inference_mode():
                return run(part)

        def shrink(rows: int) -> None:
            logger.warning("out of memory on %s with %d rows: two halves", self.device, rows)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

        remedy = (
            f"lower max_length (now {self.max_length}) or max_new_tokens, choose a smaller dtype, "
            f"or free memory of {self.device}"
        )
        return in_halves(unrecorded, items, shrink, remedy)

    @torch.inference_mode()
    def _check(self, model: Any) -> None:
        """Compares padded, tiled scoring with the model's own logits on two short rows."""
        row = self.tokenizer("1 + 1 = 2, 2 + 2 = 4", add_special_tokens=False)["input_ids"][:16]
        if len(row) < 3:
            raise ValueError(f"the tokenizer of {self.spec.path!r} gives {row} for a short sum")
        short = row[: len(row) // 2 + 1]
        pair = [(row, (1, len(row))), (short, (1, len(short)))]
        ours = self._score(pair, frozenset())[1].logprobs
        logits = model(input_ids=torch.tensor([short], device=self.device)).logits[0, :-1]
        targets = torch.tensor(short[1:], device=self.device)[:, None]
        theirs = logits.float().log_softmax(dim=1).gather(1, targets)[:, 0].cpu().numpy()
        worst = float(np.abs(ours - theirs).max())
        if not worst <= TOLERANCE[self.spec.dtype]:
            raise ValueError(
                f"{self.spec.path!r} ({model.config.model_type}) gives other log-probabilities "
                f"padded than alone (off by {worst:.3g}): it is not a plain causal model; "
                "use the vllm engine"
            )


def check_tokens(rows: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Refuses token ids without an embedding; on a GPU one would end the process.

    Raises:
        ValueError: naming the first.
    """
    for row in rows:
        if not 0 <= min(row, default=0) <= max(row, default=0) < vocabulary:
            unknown = next(token for token in row if not 0 <= token < vocabulary)
            raise ValueError(
                f"token {unknown} where the model knows {vocabulary}: its tokenizer has tokens "
                "that were added without weights for them"
            )


def _load(spec: ModelSpec) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # An adapter is merged in float32 and cast afterwards: merging in half precision rounds it away.
    dtype = torch.float32 if spec.adapter else getattr(torch, spec.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(check_directory(spec)),
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=spec.trust_remote_code,
    )
    if spec.adapter:
        from peft import PeftModel

        folder = str(Path(spec.adapter).expanduser())
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model.to(getattr(torch, spec.dtype)).eval()


def _model_ends(model: Any) -> frozenset[int]:
    """End-of-sequence ids of the generation config, which may name several."""
    ends = model.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
