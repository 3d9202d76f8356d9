"""vLLM inside the worker: how scores and texts are asked of it.

Log-probabilities of prompt tokens come by one of two routes. The V2 runner (GPU) takes the token
ids to score and a start row, projects only those rows and returns a float32 array. The V1 runner
returns every row in flat lists (`prompt_logprobs=0`, no top-k). Which route is open is tried once
at start. A request that returns without scores (the V2 runner drops preempted ones) is asked again.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.engines.pipe import Frame, list_column
from siftline.scoring.engines.vllm_options import engine_options, installed, set_environment

TRIES = 4
"""Times a row is asked before it is given up."""

Answer = TypeVar("Answer")


def open_backend(facts: Mapping[str, Any]) -> "VllmBackend":
    """Starts vLLM for `facts`: the fields of a `ModelSpec` as "spec", and "max_length".

    Raises:
        ValueError: if vLLM is missing, or is not a build for the device asked for.
    """
    spec, max_length = ModelSpec(**facts["spec"]), int(facts["max_length"])
    release, cpu = installed()
    set_environment(spec.device, cpu=cpu)
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMClientError

    llm = LLM(**engine_options(spec, max_length, cpu=cpu))
    vocab = llm.llm_engine.model_config.get_vocab_size()
    return VllmBackend(llm, SamplingParams, (VLLMClientError,), vocab, max_length, release)


class VllmBackend:
    """Answers the frames of `vllm_engine` with one vLLM engine.

    Attributes:
        route: "prompt_logprob_token_ids" or "prompt_logprobs"; see the module's docstring.
        asked_again: Rows that came back without scores so far and were asked again.
    """

    def __init__(
        self,
        llm: Any,
        params: Callable[..., Any],
        refusals: tuple[type[Exception], ...],
        vocab: int,
        max_length: int,
        release: str,
    ) -> None:
        """Wraps a running engine and tries which route to scores is open.

        Args:
            llm: A `vllm.LLM`.
            params: `vllm.SamplingParams`.
            refusals: What vLLM raises at a request it does not accept.
            vocab: Number of tokens the model knows.
            max_length: Most tokens of one row.
            release: vLLM's version.
        """
        self.llm = llm
        self.params = params
        self.refusals = refusals
        self.vocab = vocab
        self.max_length = max_length
        self.release = release
        self.asked_again = 0
        self._under_way: set[str] = set()
        self.route = "prompt_logprob_token_ids" if self._scores_token_ids() else "prompt_logprobs"

    def facts(self) -> dict[str, Any]:
        """Version and route, which decide the numbers beside the model."""
        return {"version": self.release, "route": self.route, "pid": os.getpid()}

    def handle(self, request: Frame) -> Frame:
        """Answers the requests of `vllm_engine`; their columns stand there."""
        if request.kind == "drop":
            self.drop()
            return Frame("reply")
        # A call of its own would step the draws under way, and lose those that end.
        assert request.kind == "advance" or not self._under_way, request.kind
        before = self.asked_again
        rows = request.lists("tokens")
        self._check_ids(rows)
        if request.kind == "score":
            scored = self.score(rows, request.columns["start"].to_pylist())
            columns = {"values": list_column([s and s[0] for s in scored], pa.float32())}
            if request.facts["ranks"]:
                columns["ranks"] = list_column([s and s[1] for s in scored], pa.int32())
        elif request.kind == "next":
            self._check_ids([request.facts["targets"]])
            values = self.next_tokens(rows, request.facts["targets"])
            columns = {"values": list_column(values, pa.float32())}
        elif request.kind == "advance":
            names, seeds = request.columns["name"].to_pylist(), request.columns["seed"].to_pylist()
            ended = self.advance(names, rows, seeds, request.facts)
            columns = {"name": pa.array([name for name, _, _ in ended], pa.int64())}
            columns |= _drawn_columns([(tokens, why) for _, tokens, why in ended])
        else:
            assert request.kind == "generate", request.kind
            drawn = self.generate(rows, request.lists("seeds"), request.facts)
            columns = _drawn_columns(drawn)
        return Frame("reply", {"asked_again": self.asked_again - before}, columns)

    def score(
        self, rows: Sequence[list[int]], starts: Sequence[int]
    ) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """Log-probabilities of row[start:], float32, and ranks, int32; 1 <= start < its length.

        Ranks are empty on the route that has none. None is a row without scores.
        """
        flat = self.route == "prompt_logprobs"
        make = _flat_params if flat else _token_id_params
        read = _read_flat if flat else _read_token_ids
        jobs = list(zip(rows, starts, strict=True))
        return self._ask(
            list(rows),
            lambda i: self._params(**make(*jobs[i])),
            lambda i, output: read(output, *jobs[i]),
        )

    def next_tokens(self, rows: Sequence[list[int]], targets: list[int]) -> list[np.ndarray | None]:
        """Log-probabilities of `targets` right after each row, float32 (targets,), or None."""
        wanted = sorted(set(targets))

        def read(_: int, output: Any) -> np.ndarray | None:
            found = output.outputs[0].logprobs
            if not found or any(target not in found[0] for target in wanted):
                return None
            return np.array([found[0][target].logprob for target in targets], np.float32)

        return self._ask(
            list(rows), lambda _: self._params(**_ONE_TOKEN, logprob_token_ids=wanted), read
        )

    def generate(
        self, rows: Sequence[list[int]], seeds: Sequence[list[int]], how: Mapping[str, Any]
    ) -> list[tuple[list[int], str]]:
        """Draws a text for each (row, seed), rows first: its tokens and "stop" or "length".

        One request a draw: vLLM's own n > 1 would use seed, seed + 1, ... instead of ours.
        """
        prompts, params = [], []
        for row, own in zip(rows, seeds, strict=True):
            for seed in own:
                prompts.append(row)
                params.append(self._draw_params(row, seed, how))
        return [_drawn(output) for output in self._run(prompts, params)]

    def advance(
        self,
        names: Sequence[int],
        rows: Sequence[list[int]],
        seeds: Sequence[int],
        how: Mapping[str, Any],
    ) -> list[tuple[int, list[int], str]]:
        """Begins draws, and runs until one of those under way has ended.

        Args:
            names: What to call each new draw; not used by one under way.
            rows: Its prompt.
            seeds: Its seed.
            how: Sampling and ends.

        Returns:
            Name, tokens and "stop" or "length" of each that ended; nothing when none is under way.
        """
        params = [self._draw_params(row, seed, how) for row, seed in zip(rows, seeds, strict=True)]
        engine = self.llm.llm_engine
        for name, row, own in zip(names, rows, params, strict=True):
            try:
                engine.add_request(str(name), {"prompt_token_ids": row}, own)
            except self.refusals as error:
                self.drop()
                raise ValueError(f"vLLM refuses the request: {error}") from error
            self._under_way.add(str(name))
        ended: list[tuple[int, list[int], str]] = []
        while self._under_way and not ended:
            for output in engine.step():
                if output.finished:
                    self._under_way.remove(output.request_id)
                    ended.append((int(output.request_id), *_drawn(output)))
        return ended

    def drop(self) -> None:
        """Ends the draws under way without an answer."""
        self.llm.llm_engine.abort_request(sorted(self._under_way))
        self._under_way.clear()
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()

    def _draw_params(self, row: Sequence[int], seed: int, how: Mapping[str, Any]) -> Any:
        return self._params(
            seed=seed,
            temperature=how["temperature"],
            top_p=how["top_p"],
            max_tokens=min(how["max_new_tokens"], self.max_length - len(row)),
            stop=how["stop"],
            stop_token_ids=how["ends"],
            detokenize=bool(how["stop"]),
        )

    def _check_ids(self, rows: Sequence[Sequence[int]]) -> None:
        """Refuses unknown ids: inside vLLM they raise half-way and leave it looping for good."""
        for row in rows:
            if row and not 0 <= min(row) <= max(row) < self.vocab:
                worst = max(row) if max(row) >= self.vocab else min(row)
                raise ValueError(
                    f"token id {worst} is outside the model's vocabulary of {self.vocab}: "
                    "the tokenizer belongs to another model"
                )

    def _ask(
        self,
        rows: list[list[int]],
        make: Callable[[int], Any],
        read: Callable[[int, Any], Answer | None],
    ) -> list[Answer | None]:
        """Runs rows until each has an answer, which `read` takes out of row i's output or lacks.

        After `TRIES` a row is left without one. Several rows and no answer is a broken engine.
        """
        answers: dict[int, Answer] = {}
        for attempt in range(TRIES):
            waiting = [i for i in range(len(rows)) if i not in answers]
            if not waiting:
                break
            self.asked_again += len(waiting) if attempt else 0
            outputs = self._run([rows[i] for i in waiting], [make(i) for i in waiting])
            for i, output in zip(waiting, outputs, strict=True):
                answer = read(i, output)
                if answer is not None:
                    answers[i] = answer
        if len(rows) > 1 and not answers:
            raise RuntimeError(
                f"all {len(rows)} rows came back without scores {TRIES} times: give vLLM more "
                "memory or score fewer rows at once (batch_tokens)"
            )
        return [answers.get(i) for i in range(len(rows))]

    def _params(self, **options: Any) -> Any:
        """Sampling parameters of vLLM, which checks some of the values when they are made."""
        try:
            return self.params(**options)
        except self.refusals as error:
            raise ValueError(f"vLLM refuses the request: {error}") from error

    def _run(self, rows: Sequence[list[int]], params: Sequence[Any]) -> list[Any]:
        """One call of vLLM; only a request it refused before running anything is a ValueError."""
        if not rows:
            return []
        prompts = [{"prompt_token_ids": row} for row in rows]
        try:
            outputs: list[Any] = self.llm.generate(prompts, list(params), use_tqdm=False)
        except self.refusals as error:
            if self.llm.llm_engine.has_unfinished_requests():
                raise RuntimeError(f"vLLM stopped half-way: {error}") from error
            raise ValueError(f"vLLM refuses the request: {error}") from error
        except ValueError as error:
            raise RuntimeError(f"vLLM failed: {error}") from error
        assert len(outputs) == len(rows), f"{len(outputs)} outputs for {len(rows)} rows"
        return outputs

    def _scores_token_ids(self) -> bool:
        """Whether vLLM scores given ids of a prompt: its version and its runner decide."""
        row = [0, 0, 0]
        try:
            output = self._run([row], [self._params(**_token_id_params(row, 1))])[0]
        except (TypeError, ValueError):
            return False
        return _read_token_ids(output, row, 1) is not None


def _drawn(output: Any) -> tuple[list[int], str]:
    """Tokens of an ended draw, and why it ended."""
    text = output.outputs[0]
    if text.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a draw for {text.finish_reason!r}")
    return list(text.token_ids), text.finish_reason


def _drawn_columns(drawn: Sequence[tuple[list[int], str]]) -> dict[str, pa.Array]:
    return {
        "tokens": list_column([np.array(t, np.int32) for t, _ in drawn], pa.int32()),
        "finish": pa.array([reason for _, reason in drawn], pa.string()),
    }


_ONE_TOKEN = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}


def _flat_params(row: list[int], start: int) -> dict[str, Any]:
    return {**_ONE_TOKEN, "prompt_logprobs": 0, "flat_logprobs": True}


def _read_flat(output: Any, row: list[int], start: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The last len(row) - start entries: flat lists hold one entry for each token but the first."""
    flat = output.prompt_logprobs
    if flat is None or list(flat.token_ids) != row[1:]:
        return None
    ranks = np.array(flat.ranks[start - 1 :], np.int32)
    return np.array(flat.logprobs[start - 1 :], np.float32), ranks


def _token_id_params(row: list[int], start: int) -> dict[str, Any]:
    """Row i of the ids is scored as the prompt's token number prompt_logprob_start + i + 1."""
    ids = np.array(row[start:], np.int32)[:, None]
    return {**_ONE_TOKEN, "prompt_logprob_token_ids": ids, "prompt_logprob_start": start - 1}


def _read_token_ids(
    output: Any, row: list[int], start: int
) -> tuple[np.ndarray, np.ndarray] | None:
    values = output.prompt_token_id_logprobs
    if values is None:
        return None
    scores = np.asarray(values, np.float32)
    assert scores.shape == (len(row) - start, 1), f"{scores.shape} for {len(row) - start} rows"
    return scores[:, 0], np.zeros(0, np.int32)
