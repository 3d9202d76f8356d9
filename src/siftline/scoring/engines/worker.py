"""The worker: vLLM in a process of its own, spoken to in frames over its stdin and stdout.

Run as `python -m siftline.scoring.engines.worker --parent PID`, by `worker_process` only. A process
of its own keeps vLLM's pins out of ours, and its end is the one sure way to give the card back
(vLLM has no clean shutdown in-process). It may run under another interpreter: that environment
needs siftline
(`pip install --no-deps` will do), pyarrow, numpy and vllm.

It must not outlive its parent. Three things see to that: stdin ends when the parent closes it or
dies; a thread watches the parent's pid, for when the worker is in the middle of a call or a fork of
the parent holds the pipe open; and the kernel kills it with the parent, for when vLLM's C++ holds
the interpreter's lock. The last is armed only if the parent's main thread started it, because the
kernel counts the starting *thread's* end as the parent's death.

vLLM and its libraries print to stdout. The worker therefore moves its pipe to private descriptors
at once and lets descriptor 1 mean stderr.

vLLM inside the worker: how scores and texts are asked of it.
"""

import argparse
import ctypes
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.engines.vllm_options import engine_options, installed, set_environment
from siftline.scoring.engines.worker_process import Frame, list_column, read_frame, write_frame

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


PR_SET_PDEATHSIG = 1
WATCH_SECONDS = 0.5
LONGEST_LINE = 600
"""Characters of an error that cross the pipe; the traceback on stderr has the rest."""


class Backend(Protocol):
    """What the worker serves."""

    def facts(self) -> Mapping[str, Any]:
        """What the engine must know about it, JSON-serialisable."""
        ...

    def handle(self, request: Frame) -> Frame:
        """Answers one request.

        A ValueError refuses the request and leaves the backend usable; any other exception ends the
        worker, because what it left behind inside the engine is unknown.
        """
        ...


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, cut to a readable length."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 4] + " ..."


def error_frame(error: BaseException, *, fatal: bool) -> Frame:
    """The frame that carries `error` to the parent; its traceback goes to stderr."""
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    refused = isinstance(error, ValueError)
    line = one_line(error) if refused else f"{type(error).__name__}: {one_line(error)}"
    return Frame("error", {"refused": refused, "line": line, "fatal": fatal})


def follow_parent(parent: int, *, armed: bool) -> None:
    """Makes this process end when process `parent` does; returns at once.

    Args:
        parent: Process id of the parent.
        armed: Also ask the kernel for SIGKILL at the end of the thread that started us (Linux).
    """
    if armed and sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")

    def watch() -> None:
        # Also covers a parent that died before the line above.
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()


def claim_pipe() -> tuple[int, int]:
    """Moves stdin and stdout to private descriptors; from then on prints go to stderr.

    Returns:
        (descriptor to read frames from, descriptor to write frames to). Programs that the worker
        starts inherit neither.
    """
    frames_in, frames_out = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # unbuffered, and in order with the tracebacks
    return frames_in, frames_out


def serve(open_backend: Callable[[Mapping[str, Any]], Backend], source: int, sink: int) -> int:
    """Answers frames until the input ends. The first opens the backend with its facts.

    Returns:
        The exit status: 0 at the end of input, 1 after a failure (which has been reported).
    """
    read = functools.partial(os.read, source)
    backend: Backend | None = None
    while (request := read_frame(read)) is not None:
        try:
            if backend is None:
                backend = open_backend(request.facts)
                reply = Frame("ready", backend.facts())
            else:
                reply = backend.handle(request)
        except Exception as error:
            reply = error_frame(error, fatal=backend is None or not isinstance(error, ValueError))
        write_frame(sink, reply)
        if reply.kind == "error" and reply.facts["fatal"]:
            return 1
    return 0


def open_vllm(facts: Mapping[str, Any]) -> Backend:
    """Starts vLLM; imported here, so that a failing import is reported like any other failure."""
    return open_backend(facts)


def main(
    arguments: Sequence[str] | None = None,
    open_backend: Callable[[Mapping[str, Any]], Backend] = open_vllm,
) -> int:
    """Runs a worker in this process; returns its exit status."""
    parser = argparse.ArgumentParser(prog="siftline.scoring.engines.worker")
    parser.add_argument("--parent", type=int, required=True, help="process to end with")
    parser.add_argument("--armed", action="store_true", help="started by its main thread")
    options = parser.parse_args(arguments)
    # Ctrl-C reaches the whole group; the parent decides, and closing the pipe ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = claim_pipe()
    follow_parent(options.parent, armed=options.armed)
    try:
        return serve(open_backend, source, sink)
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # Not sys.exit: vLLM's threads and destructors can hold an orderly exit up for good.
    os._exit(status)
