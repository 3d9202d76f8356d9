"""The embedded engine: a transformers model in this process, on CPU or GPU.

One call is one forward over one planned batch. The vocabulary is projected only for scored
positions and tile by tile, so nothing of size tokens x vocabulary exists: at 16,384 tokens and
150,000 entries that would be 10 GB in float32. Log-softmax is in float32 whatever the dtype.

Rows are padded on the right and the model gets no mask: under causal attention no real token sees
the padding behind it, and unmasked attention takes the fast kernels. That this holds for the loaded
model, and that our projection gives its logits, is checked once at load.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from siftline.scoring.engines import (
    DETAILS,
    Detail,
    Failed,
    Generation,
    Inspection,
    ModelSpec,
    Sampling,
    Span,
    check_details,
    check_directory,
    check_rows,
    check_spans,
    positions,
    score_options,
)
from siftline.scoring.fingerprint import model_fingerprint
from siftline.scoring.sampling import draw_texts
from siftline.scoring.spans import stop_tokens
from siftline.scoring.templates import load_tokenizer

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

VERSION = 1
"""Raise it when a change of this file changes numbers beyond rounding: stored scores go stale."""
TILE = 1024
"""Positions projected to the vocabulary at once; vLLM's V2 runner uses the same."""
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
        self.device = _device(spec.device)
        model = _load(spec).to(self.device)
        self.config = model.config.get_text_config(decoder=True)
        limit = getattr(self.config, "max_position_embeddings", None) or spec.max_length
        self.max_length = min(spec.max_length, limit)
        self._decoder = model.base_model
        self._head = model.get_output_embeddings()
        self._scale, self._softcap = _logit_changes(self.config)
        self._ends = stop_tokens(self.tokenizer) | _model_ends(model)
        self._fingerprint: str | None = None
        self._check(model)
        logger.info("transformers engine on %s in %s: %s", self.device, spec.dtype, spec.path)

    def hidden(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Last hidden states (after the final norm), shape (B, T, H), of token ids (B, T)."""
        options.setdefault("use_cache", False)
        hidden: torch.Tensor = self._decoder(input_ids=ids, **options).last_hidden_state
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits, shape (n, V), of hidden states, shape (n, H)."""
        logits: torch.Tensor = self._head(hidden).float() * self._scale
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def score(
        self, tokens: Sequence[Sequence[int]], spans: Sequence[Span]
    ) -> list[np.ndarray | Failed]:
        """Log-probabilities of the tokens in each row's span, float32 (L,) a row.

        Raises:
            ValueError: if a row is longer than `max_length` or a span is not within its row.
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
        if not options or not all(options):
            raise ValueError("options must be given and none may be empty")
        if all(len(option) == 1 for option in options):
            self._usable(prompts)
            targets = [option[0] for option in options]
            parts = self._halving(lambda part: self._next(part, targets), list(prompts))
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
        texts = iter(self._halving(lambda part: self._draw(part, sampling), flat))
        return [[next(texts) for _ in own] for own in seeds]

    def embed(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """Unit-length mean of last hidden states with weights 1..L, float32 (n, d).

        RDS+ (Ivison et al. 2025, hamishivi/automated-instruction-selection).
        """
        self._usable(tokens)
        rows = self._halving(self._embed, list(tokens))
        return np.stack(rows) if rows else np.zeros((0, self.config.hidden_size), np.float32)

    def fingerprint(self) -> str:
        """Hash of model files, adapter, dtype, template, torch's minor version and VERSION."""
        if self._fingerprint is None:
            release = ".".join(torch.__version__.split(".")[:2])
            self._fingerprint = model_fingerprint(
                self.spec, "transformers", f"torch {release}, engine {VERSION}"
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

    def _padded(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor(
            [[*row, *[0] * (longest - len(row))] for row in rows], device=self.device
        )

    def _log_probabilities(self, hidden: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
        """float32 log p of targets (n, k) given hidden states (n, H), tile by tile."""
        parts = []
        for start in range(0, len(hidden), TILE):
            logits = self.logits(hidden[start : start + TILE])
            picked = logits.gather(1, targets[start : start + TILE])
            parts.append((picked - logits.logsumexp(dim=1, keepdim=True)).cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros(tuple(targets.shape), np.float32)

    def _statistics(self, hidden: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
        """float32 (n, 3): log p of targets (n,), entropy, and 1 where the target is most likely."""
        out = np.zeros((len(hidden), 3), np.float32)
        for start in range(0, len(hidden), TILE):
            logits = self.logits(hidden[start : start + TILE])
            picked = logits.gather(1, targets[start : start + TILE, None])
            top1 = picked[:, 0] >= logits.amax(dim=1)
            norm = logits.logsumexp(dim=1, keepdim=True)
            logprobs = logits - norm
            # 0 log 0 is 0: tokens that a model rules out have -inf here.
            parts = logprobs.exp().mul_(logprobs.nan_to_num_(neginf=0.0))
            columns = (picked - norm)[:, 0], -parts.sum(dim=1), top1.float()
            out[start : start + TILE] = torch.stack(columns, dim=1).cpu().numpy()
        return out

    def _inspect(
        self, tokens: Sequence[Sequence[int]], spans: Sequence[Span], wanted: frozenset[Detail]
    ) -> list[Inspection]:
        self._usable(tokens)
        check_spans(tokens, spans)
        jobs = list(zip(tokens, spans, strict=True))
        return self._halving(lambda part: self._score(part, wanted), jobs)

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
        if wanted & {"entropy", "top1"}:
            flat = self._statistics(hidden, targets)
        else:
            flat = self._log_probabilities(hidden, targets[:, None])
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
        return list(self._log_probabilities(hidden, wanted))

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

    def _halving(
        self, run: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]
    ) -> list[Result]:
        """Runs a batch; when memory runs out, its first and second half, and so on by this rule."""
        if not items:
            return []
        try:
            with torch.inference_mode():
                return run(items)
        except torch.OutOfMemoryError as error:
            if len(items) == 1:
                raise RuntimeError(
                    f"out of memory on {self.device} with a single row: lower max_length "
                    f"(now {self.max_length}) or max_new_tokens, or choose a smaller dtype"
                ) from error
        # Out of the except block, whose traceback would keep the failed batch's tensors alive.
        middle = (len(items) + 1) // 2
        logger.warning("out of memory with %d rows: running %d at a time", len(items), middle)
        torch.cuda.empty_cache()
        return self._halving(run, items[:middle]) + self._halving(run, items[middle:])

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


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r} but torch sees no CUDA device: use cpu or auto")
    return torch.device(name)


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

        model = PeftModel.from_pretrained(model, spec.adapter).merge_and_unload()
    return model.to(getattr(torch, spec.dtype)).eval()


def _logit_changes(config: Any) -> tuple[float, float | None]:
    """(factor, soft cap) that some architectures apply behind the projection."""
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is None and getattr(config, "logits_scaling", None):  # Granite
        scale = 1 / config.logits_scaling
    return (1.0 if scale is None else scale), getattr(config, "final_logit_softcapping", None)


def _model_ends(model: Any) -> frozenset[int]:
    """End-of-sequence ids of the generation config, which may name several."""
    ends = model.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
