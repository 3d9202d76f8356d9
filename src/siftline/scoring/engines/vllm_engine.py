"""The vLLM engine, seen from the parent: an `Engine` whose model lives in a worker process.

The tokenizer stays here and only token ids cross the pipe, so both engines see the same tokens and
ends of sequence, and cut texts alike. This module never imports vllm. Calls and their columns:

    score     tokens, start; facts: ranks          -> values: log p of tokens[start:]; ranks
    next      tokens; facts: targets               -> values: log p of each target after tokens
    generate  tokens, seeds; facts: Sampling, ends -> tokens, finish; one a seed, prompts first
    advance   name, tokens, seed; same facts       -> name, tokens, finish of draws that ended
    drop      nothing                              -> nothing; ends what `advance` began

A null in values is a row without scores. A row is sent only up to the end of its span: what
follows cannot change its scores.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from siftline import scoring as versions
from siftline.scoring.engines.base import (
    NO_SCORES,
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
from siftline.scoring.engines.worker_process import Frame, WorkerProcess, list_column
from siftline.scoring.fingerprint import model_fingerprint
from siftline.scoring.recorder import Pull, fitting
from siftline.scoring.spans import stop_tokens
from siftline.scoring.templates import load_tokenizer

logger = logging.getLogger(__name__)

MOST_TARGETS = 128
"""vLLM's limit on logprob_token_ids."""
SLOTS = 256
"""Draws under way at a time: vLLM's own default of max_num_seqs on most cards."""


class VllmEngine:
    """Scores and samples with vLLM in a worker process. See `engines.Engine`; it does not embed.

    Attributes:
        asked_again: Rows that vLLM returned without scores and that were asked again.
        slots: Draws of a stream that are under way at a time.
    """

    slots = SLOTS

    def __init__(self, spec: ModelSpec) -> None:
        """Starts the worker and loads the model in it.

        Raises:
            ValueError: if the directory is missing or incomplete, an adapter is named, or the
                worker's interpreter has no vllm.
            RuntimeError: if vLLM fails to start.
        """
        if spec.adapter is not None:
            raise ValueError(
                f"the vllm engine takes no adapter ({spec.adapter!r}): merge it into the model and "
                "save that, or use engine: transformers"
            )
        check_directory(spec)
        self.spec = spec
        self.tokenizer = load_tokenizer(spec)
        config_limit, ends = _limits(spec)
        self.max_length = min(spec.max_length, config_limit or spec.max_length)
        self._ends = sorted(stop_tokens(self.tokenizer) | ends)
        self.asked_again = 0
        # -P: a file of the current folder named like a library must not stand in for it.
        program = os.path.expanduser(spec.python or sys.executable)
        self._worker = WorkerProcess([program, "-P", "-m", "siftline.scoring.engines.worker"])
        facts = {"spec": dataclasses.asdict(spec), "max_length": self.max_length}
        try:
            self._facts = self._worker.call(Frame("open", facts)).facts
        except BaseException:
            self._worker.close(wait=0)
            raise
        logger.info("vllm %(version)s scores by %(route)s in process %(pid)s", self._facts)

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._worker.process.pid

    @property
    def details(self) -> frozenset[Detail]:
        """Top-1 hits where vLLM tells the rank of a prompt token; its compact route does not."""
        flat = self._facts["route"] == "prompt_logprobs"
        return frozenset(("top1",)) if flat else frozenset()

    def score(
        self, tokens: Sequence[Sequence[int]], spans: Sequence[Span]
    ) -> list[np.ndarray | Failed]:
        """Log-probabilities of the tokens in each row's span, float32 (L,) a row.

        Raises:
            ValueError: if a row is longer than `max_length`, a span is not within its row, or a
                token is unknown to the model.
        """
        return [
            found if isinstance(found, Failed) else found.logprobs
            for found in self.inspect(tokens, spans, ())
        ]

    def inspect(
        self,
        tokens: Sequence[Sequence[int]],
        spans: Sequence[Span],
        wanted: Collection[Detail],
    ) -> list[Inspection | Failed]:
        """`score`, and whether each token was the most likely one.

        Raises:
            ValueError: as `score`; or if something else is wanted: vLLM keeps neither entropy nor
                hidden states.
        """
        check_details("vllm", wanted, self.details)
        check_rows(tokens, self.max_length)
        check_spans(tokens, spans)
        none = np.zeros(0, np.float32)
        out: list[Inspection | Failed] = [Inspection(none, top1=none > 0) for _ in tokens]
        asked = [i for i, span in enumerate(spans) if len(positions(span))]
        if not asked:
            return out
        columns = {
            "tokens": _token_column([tokens[i][: spans[i][-1]] for i in asked]),
            "start": pa.array([spans[i][0] for i in asked], pa.int32()),
        }
        reply = self._ask(Frame("score", {"ranks": "top1" in wanted}, columns))
        values = _arrays(reply.columns["values"])
        ranks = _arrays(reply.columns["ranks"]) if "top1" in wanted else [None] * len(asked)
        for i, logprobs, rank in zip(asked, values, ranks, strict=True):
            if logprobs is None:
                out[i] = Failed(NO_SCORES)
                continue
            inside = positions(spans[i]) - spans[i][0]
            top1 = None if rank is None else rank[inside] == 1
            out[i] = Inspection(logprobs[inside], top1=top1)
        return out

    def choices(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Summed log-probability of each option after each prompt, float32 (prompts, options).

        One request a prompt when every option is one token, else one a pair.
        """
        check_options(options)
        if not prompts:
            return np.zeros((0, len(options)), np.float32)
        if all(len(option) == 1 for option in options) and len(options) <= MOST_TARGETS:
            check_rows(prompts, self.max_length)
            targets = [int(option[0]) for option in options]
            columns = {"tokens": _token_column(prompts)}
            found = _arrays(
                self._ask(Frame("next", {"targets": targets}, columns)).columns["values"]
            )
            lacking = np.full(len(options), np.nan, np.float32)
            return np.stack([lacking if row is None else row for row in found])
        return score_options(self, prompts, options)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> list[list[Generation | Failed]]:
        """Draws len(seeds[i]) texts for prompt i. Seeds are from 0 to 2**63 - 1.

        Raises:
            ValueError: if a prompt leaves no room for an answer, or vLLM refuses the sampling (it
                takes temperatures up to 2).
        """
        check_rows(prompts, self.max_length, room=1)
        pairs = list(zip(prompts, seeds, strict=True))
        if not any(own for _, own in pairs):
            return [[] for _ in pairs]
        columns = {
            "tokens": _token_column(prompts),
            "seeds": list_column([np.array(own, np.int64) for own in seeds], pa.int64()),
        }
        facts = {**dataclasses.asdict(sampling), "ends": self._ends}
        reply = self._worker.call(Frame("generate", facts, columns))
        finish = reply.columns["finish"].to_pylist()
        drawn = zip(reply.lists("tokens"), finish, strict=True)
        return by_prompt((self._generation(t, why, sampling.stop) for t, why in drawn), seeds)

    def stream(self, pull: Pull, sampling: Sampling) -> Iterator[tuple[Any, Generation | Failed]]:
        """Draws what `pull` gives as slots come free. See `recorder.Streaming`.

        A prompt that leaves no room for an answer is refused alone.

        Raises:
            ValueError: if a prompt has an unknown token, or vLLM refuses the sampling.
        """
        facts = {**dataclasses.asdict(sampling), "ends": self._ends}
        flying: dict[int, Any] = {}
        begun = 0
        try:
            while True:
                given = pull(self.slots - len(flying), not flying)
                if not given and not flying:
                    return
                asked, refused = fitting(given, self.max_length)
                yield from refused
                if not asked and not flying:
                    continue
                numbers = range(begun, begun + len(asked))
                begun += len(asked)
                flying |= {n: name for n, (name, _, _) in zip(numbers, asked, strict=True)}
                columns = {
                    "name": pa.array(numbers, pa.int64()),
                    "tokens": _token_column([tokens for _, tokens, _ in asked]),
                    "seed": pa.array([seed for _, _, seed in asked], pa.int64()),
                }
                reply = self._worker.call(Frame("advance", facts, columns))
                found = zip(
                    reply.columns["name"].to_pylist(),
                    reply.lists("tokens"),
                    reply.columns["finish"].to_pylist(),
                    strict=True,
                )
                for number, drawn, why in found:
                    yield flying.pop(number), self._generation(drawn, why, sampling.stop)
        finally:
            if flying and not self._worker.closed:
                self._worker.call(Frame("drop"))

    def embed(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """Refuses: vLLM pools by CLS, last or plain mean, not with RDS+'s weights by position."""
        raise ValueError(
            "the vllm engine does not embed: give the embedder engine: transformers "
            "or engine: sentence-transformers"
        )

    def fingerprint(self) -> str:
        """Hash of model files, dtype, template, vLLM's minor version and route, and our version."""
        release = ".".join(self._facts["version"].split(".")[:2])
        return model_fingerprint(
            self.spec, "vllm", f"vllm {release}, {self._facts['route']}, engine {versions.VLLM}"
        )

    def close(self) -> None:
        """Ends the worker, which frees its memory and its card."""
        self._worker.close()

    def __enter__(self) -> "VllmEngine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._worker.close()

    def _ask(self, request: Frame) -> Frame:
        """Asks for scores, and counts the rows asked again."""
        reply = self._worker.call(request)
        again = reply.facts["asked_again"]
        if again:
            self.asked_again += again
            logger.warning("vllm returned %d rows without scores; they were asked again", again)
        return reply

    def _generation(self, tokens: list[int], reason: str, stop: tuple[str, ...]) -> Generation:
        body = tokens[:-1] if tokens and tokens[-1] in self._ends else tokens
        text = self.tokenizer.decode(body, skip_special_tokens=True)
        cut = min((text.find(s) for s in stop if s in text), default=len(text))
        return Generation(text[:cut], len(tokens), reason)


def _arrays(column: pa.Array) -> list[np.ndarray | None]:
    """The rows of a list column as arrays; None for a null."""
    flat = column.flatten().to_numpy(zero_copy_only=False).copy()
    lengths = pa.compute.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    parts = np.split(flat, np.cumsum(lengths)[:-1])
    return [part if valid else None for part, valid in zip(parts, column.is_valid(), strict=True)]


def _token_column(rows: Sequence[Sequence[int]]) -> pa.Array:
    return list_column([np.asarray(row, np.int32) for row in rows], pa.int32())


def _limits(spec: ModelSpec) -> tuple[int | None, frozenset[int]]:
    """The model's longest row, if its config says, and the ends of sequence it names."""
    from transformers import AutoConfig, GenerationConfig

    folder = str(check_directory(spec))
    options = {"local_files_only": True, "trust_remote_code": spec.trust_remote_code}
    config = AutoConfig.from_pretrained(folder, **options)
    if (Path(folder) / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    else:
        ends = GenerationConfig.from_model_config(config).eos_token_id
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return longest, frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
