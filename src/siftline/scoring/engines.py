"""What a scorer may ask of a model, and how a recipe names one.

Engines see token ids only, never text, so what was asked is the same whichever engine answers. The
engines themselves are imported inside `open_engine`: reading a recipe must not load torch or vllm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np


@dataclass(frozen=True)
class ModelSpec:
    """A model as a recipe names it.

    Attributes:
        path: Local model directory in the Hugging Face layout. Nothing is downloaded.
        engine: Which implementation runs it.
        dtype: Type of weights and activations. float32 by default, because engines agree within
            1e-4 only there; log-probabilities are always accumulated in float32.
        device: "auto" takes CUDA if there is a device, else the CPU; or a torch device name.
        max_length: Tokens of prompt and response together; longer rows fail with `too_long`.
            2048 is the length RDS+ and most instruction-tuning recipes use.
        template: Jinja chat template. None: the tokenizer's own, else `templates.QUESTION_ANSWER`.
        batch_tokens: Tokens of one planned batch, padding included.
        trust_remote_code: Whether Python files in the model directory may run.
        python: Interpreter of the vllm worker; None is the running one.
        adapter: Local directory of a peft adapter to apply.
    """

    path: str
    engine: Literal["transformers", "vllm", "sentence-transformers"] = "transformers"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    max_length: int = 2048
    template: str | None = None
    batch_tokens: int = 16384
    trust_remote_code: bool = False
    python: str | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ("transformers", "vllm", "sentence-transformers"):
            raise ValueError(
                f"engine is {self.engine!r}: choose transformers, vllm or sentence-transformers"
            )
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}: choose float32, bfloat16 or float16")
        for name in ("max_length", "batch_tokens"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 2 tokens")


@dataclass(frozen=True)
class Sampling:
    """How to draw text.

    Attributes:
        max_new_tokens: Most tokens of one draw, end of sequence included.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Draws only from the smallest set of tokens that holds this probability.
        stop: A draw ends before the first of these strings.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: it must be finite, 0 or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which every text contains: leave it out")


@dataclass(frozen=True)
class Generation:
    """One draw: its text without the stop string, tokens drawn, and why it ended.

    `finish_reason` is "stop" (end of sequence or a stop string) or "length".
    """

    text: str
    n_tokens: int
    finish_reason: str


class Engine(Protocol):
    """A causal language model. One call is one planned unit of work (see `batching`).

    Attributes:
        tokenizer: A fast transformers tokenizer whose `chat_template` is set.
        max_length: Most tokens of one row.
    """

    tokenizer: Any
    max_length: int

    def score(
        self, tokens: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]]
    ) -> list[np.ndarray]:
        """Log-probabilities of tokens[start:end], a float32 array of shape (end - start,) a row.

        `start` is at least 1: nothing predicts the first token.
        """
        ...

    def choices(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Summed log-probability of each option after each prompt, float32 (prompts, options)."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> list[list[Generation]]:
        """Draws len(seeds[i]) texts for prompt i.

        Draw j depends on (prompt i, seeds[i][j], sampling) only, not on its neighbours.
        """
        ...

    def embed(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """Position-weighted mean of the last hidden states (RDS+), unit length, float32 (n, d)."""
        ...

    def fingerprint(self) -> str:
        """Hash of everything that decides this engine's numbers; no path and no name in it."""
        ...

    def close(self) -> None:
        """Frees the model. Calling it twice is fine; calling anything after it is an error."""
        ...


def score_options(
    engine: Engine, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[int]]
) -> np.ndarray:
    """`Engine.choices` for options of any length: every prompt is scored with every option."""
    rows = [[*prompt, *option] for prompt in prompts for option in options]
    spans = [(len(p), len(p) + len(option)) for p in prompts for option in options]
    sums = [part.sum(dtype=np.float64) for part in engine.score(rows, spans)]
    return np.array(sums, np.float32).reshape(len(prompts), len(options))


def check_directory(spec: ModelSpec) -> Path:
    """Returns the model directory of `spec`.

    Raises:
        ValueError: if it, or the adapter's, is not a local directory with its config file.
    """
    wanted = [(spec.path, "config.json")]
    if spec.engine == "sentence-transformers":
        wanted = [(spec.path, "modules.json")]
    if spec.adapter is not None:
        wanted.append((spec.adapter, "adapter_config.json"))
    for path, config in wanted:
        if not Path(path).expanduser().is_dir():
            raise ValueError(
                f"no model directory at {path!r}: give the path of a downloaded model "
                "(hf download NAME --local-dir PATH); nothing is fetched by name"
            )
        if not (Path(path).expanduser() / config).is_file():
            raise ValueError(f"{path!r} has no {config}: name the folder that holds that file")
    return Path(spec.path).expanduser()


def open_engine(spec: ModelSpec) -> Engine:
    """Loads the model of `spec` with its engine.

    Raises:
        ValueError: if the directory is missing, or the engine gives no log-probabilities.
    """
    check_directory(spec)
    if spec.engine == "transformers":
        from siftline.scoring.transformers_engine import TransformersEngine

        return TransformersEngine(spec)
    if spec.engine == "vllm":
        from siftline.scoring.vllm_engine import VllmEngine

        return VllmEngine(spec)
    raise ValueError(
        f"engine {spec.engine!r} only embeds: choose transformers or vllm for scores and text"
    )
