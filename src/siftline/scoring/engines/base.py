"""What a scorer may ask of a model, and how a recipe names one.

Engines see token ids only, never text, so what was asked is the same whichever engine answers. The
engines themselves are imported inside `open_engine`: reading a recipe must not load torch or vllm.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from siftline.scoring.engines.weights import refuse_pickles

EngineName = Literal["transformers", "vllm", "server", "sentence-transformers"]
ENGINES: tuple[EngineName, ...] = ("transformers", "vllm", "server", "sentence-transformers")

Detail = Literal["entropy", "top1", "pooled"]
DETAILS: tuple[Detail, ...] = ("entropy", "top1", "pooled")
"""What `Engine.inspect` may be asked for beside the log-probabilities."""

NO_SCORES = "no_scores"
"""Reason of a row that an engine answered without numbers."""


@dataclass(frozen=True)
class Server:
    """How an OpenAI-compatible endpoint is asked.

    Attributes:
        url: Base address, such as http://127.0.0.1:8000/v1.
        model: Name the server knows the model by; None takes the only one it lists.
        concurrency: Requests under way at a time.
        timeout_s: Seconds one request may take.
        tries: Times a row is asked before it counts as failed.
        patience_s: Seconds without any connection, or with nothing but busy answers (429, 502,
            503, 504), before the run gives up; a server that restarts within them costs nothing
            but time.
        key_variable: Environment variable that holds the API key.
    """

    url: str
    model: str | None = None
    concurrency: int = 32
    timeout_s: float = 120.0
    tries: int = 5
    patience_s: float = 300.0
    key_variable: str | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}: give it as http://HOST:PORT/v1")
        rest = self.url.partition("://")[2]
        if "@" in rest.partition("/")[0] or "?" in rest or "#" in rest:
            # Not shown: it may hold a password, and a recipe's hash and report hold the url.
            raise ValueError(
                "url holds a user, a password or a query: give it as http://HOST:PORT/v1, and the "
                "API key in the environment variable that key_variable names"
            )
        for name in ("concurrency", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("timeout_s", "patience_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give seconds above 0")


@dataclass(frozen=True)
class ModelSpec:
    """A model as a recipe names it.

    Attributes:
        path: Local model directory in the Hugging Face layout. Nothing is downloaded.
        engine: Which implementation runs it.
        dtype: Type of weights and activations. float32 by default, because engines agree within
            1e-4 only there; log-probabilities are always accumulated in float32.
        device: "auto" takes CUDA if there is a device, else the CPU; or a torch device name.
            Several, separated by commas, run a copy of the model each and share the buckets.
        max_length: Tokens of prompt and response together; longer rows fail with `too_long`.
            2048 is the length RDS+ and most instruction-tuning recipes use.
        template: Jinja chat template. None: the tokenizer's own, else `templates.QUESTION_ANSWER`.
        batch_tokens: Tokens of one planned batch, padding included.
        trust_remote_code: Whether Python files in the model directory may run.
        python: Interpreter of the vllm worker; None is the running one.
        adapter: Local directory of a peft adapter to apply.
        server: The endpoint of engine `server`. `path` then holds at least its tokenizer.
        revision: Names the weights behind a server where `path` holds none; part of the
            fingerprint, so that scores of another revision are never met.
    """

    path: str
    engine: EngineName = "transformers"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    max_length: int = 2048
    template: str | None = None
    batch_tokens: int = 16384
    trust_remote_code: bool = False
    python: str | None = None
    adapter: str | None = None
    server: Server | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine is {self.engine!r}: choose one of {', '.join(ENGINES)}")
        if (self.engine == "server") != (self.server is not None):
            raise ValueError(
                f"engine is {self.engine!r}, server is {self.server!r}: engine server needs "
                "server: {url: …}, the others take none"
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


Span = tuple[int, ...]
"""Which tokens of a row are scored: start, end, start, end, … of half-open stretches, rising."""


@dataclass(frozen=True)
class Failed:
    """In the place of an answer: this row got none. `reason` is what the ledger records."""

    reason: str


@dataclass(frozen=True)
class Inspection:
    """What one forward pass tells of a row. L is the number of scored tokens.

    Attributes:
        logprobs: Log-probability of each scored token, float32 (L,), nats.
        entropy: Entropy of each predictive distribution, float32 (L,), nats; None if not asked.
        top1: Whether each scored token was the most likely one, bool (L,); None if not asked.
        pooled: Position-weighted mean of all hidden states of the row (RDS+), unit length, float32
            (d,); None if not asked.
    """

    logprobs: np.ndarray
    entropy: np.ndarray | None = None
    top1: np.ndarray | None = None
    pooled: np.ndarray | None = None


class Engine(Protocol):
    """A causal language model. One call is one planned unit of work (see `batching`).

    A ValueError refuses the whole call and leaves the engine usable. A row that alone got no answer
    has `Failed` in its place.

    Attributes:
        tokenizer: A fast transformers tokenizer whose `chat_template` is set.
        max_length: Most tokens of one row.
    """

    tokenizer: Any
    max_length: int

    @property
    def details(self) -> frozenset[Detail]:
        """What `inspect` can be asked for."""
        ...

    def score(
        self, tokens: Sequence[Sequence[int]], spans: Sequence[Span]
    ) -> list[np.ndarray | Failed]:
        """Log-probabilities of the tokens in each row's span, float32 (L,) a row.

        A span starts at 1 or later: nothing predicts the first token.
        """
        ...

    def inspect(
        self,
        tokens: Sequence[Sequence[int]],
        spans: Sequence[Span],
        wanted: Collection[Detail],
    ) -> list[Inspection | Failed]:
        """`score` with what else the same forward pass can tell.

        Raises:
            ValueError: if something is wanted that this engine cannot give (see `details`).
        """
        ...

    def choices(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Summed log-probability of each option after each prompt, float32 (prompts, options).

        A row of NaN stands for a prompt that got no answer.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> list[list[Generation | Failed]]:
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
    sums = np.array(
        [
            np.nan if isinstance(part, Failed) else part.sum(dtype=np.float64)
            for part in engine.score(rows, spans)
        ],
        np.float32,
    ).reshape(len(prompts), len(options))
    sums[np.isnan(sums).any(axis=1)] = np.nan
    return sums


def check_rows(rows: Sequence[Sequence[int]], max_length: int, room: int = 0) -> None:
    """Refuses rows that are empty or leave less than `room` tokens.

    Raises:
        ValueError: naming the length and the limit.
    """
    for row in rows:
        if not 1 <= len(row) <= max_length - room:
            raise ValueError(
                f"a row of {len(row)} tokens where 1 to {max_length - room} fit: "
                "leave it out as too_long or raise the model's max_length"
            )


def check_spans(rows: Sequence[Sequence[int]], spans: Sequence[Span]) -> None:
    """Refuses spans that are not within their row.

    Raises:
        ValueError: naming the span.
    """
    for row, span in zip(rows, spans, strict=True):
        rising = all(a <= b for a, b in pairwise((1, *span, len(row))))
        if not span or len(span) % 2 or not rising:
            raise ValueError(
                f"span {span} of {len(row)} tokens: need 1 <= start <= end, pair after pair"
            )


def check_options(options: Sequence[Sequence[int]]) -> None:
    """Refuses no options, or an empty one, whose log-probability would be that of nothing.

    Raises:
        ValueError: saying so.
    """
    if not options or not all(options):
        raise ValueError("options must be given and none may be empty")


def by_prompt(
    found: Iterable[Generation | Failed], seeds: Sequence[Sequence[int]]
) -> list[list[Generation | Failed]]:
    """Cuts draws that came back in one row into those of each prompt, one a seed."""
    left = iter(found)
    return [[next(left) for _ in own] for own in seeds]


def check_details(engine: str, wanted: Collection[str], given: Collection[str]) -> None:
    """Refuses details that an engine cannot give.

    Raises:
        ValueError: naming them and the engine that can.
    """
    lacking = sorted(set(wanted) - set(given))
    if lacking:
        raise ValueError(
            f"the {engine} engine gives no {', '.join(lacking)}: use engine: transformers, or "
            "leave it out"
        )


def positions(span: Span) -> np.ndarray:
    """Positions of the tokens in a span, int64, rising."""
    pairs = zip(span[::2], span[1::2], strict=True)
    return np.concatenate([np.arange(start, end) for start, end in pairs])


def check_directory(spec: ModelSpec) -> Path:
    """Returns the model directory of `spec`.

    Raises:
        ValueError: if it, or the adapter's, is not a local directory with its config file, or has
            its weights as a pickle.
    """
    needed = {"sentence-transformers": "modules.json", "server": "tokenizer.json"}
    wanted = [(spec.path, needed.get(spec.engine, "config.json"))]
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
        refuse_pickles(Path(path).expanduser())
    return Path(spec.path).expanduser()


def open_engine(spec: ModelSpec) -> Engine:
    """Loads the model of `spec` with its engine.

    Raises:
        ValueError: if the directory is missing, or the engine gives no log-probabilities.
    """
    check_directory(spec)
    if spec.engine == "transformers":
        from siftline.scoring.engines.transformers_engine import TransformersEngine

        return TransformersEngine(spec)
    if spec.engine == "vllm":
        from siftline.scoring.engines.vllm_engine import VllmEngine

        return VllmEngine(spec)
    if spec.engine == "server":
        from siftline.scoring.engines.server_engine import ServerEngine

        return ServerEngine(spec)
    raise ValueError(
        f"engine {spec.engine!r} only embeds: choose transformers, vllm or server for scores "
        "and text"
    )
