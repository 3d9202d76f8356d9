"""The server engine: a model behind an OpenAI-compatible endpoint, asked row by row.

The endpoint gets token ids, never text, so it sees the same tokens as the other engines. What it
computes with is not ours to see: give its weights as `path`, or name them with `revision`. Prefix
caching makes prompt log-probabilities depend on the order of requests (vllm#42019): serve scores
with `--no-enable-prefix-caching`.
"""

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from siftline import scoring as versions
from siftline.scoring.engines.base import (
    NO_SCORES,
    Detail,
    Failed,
    Generation,
    Inspection,
    ModelSpec,
    Sampling,
    Server,
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
from siftline.scoring.engines.server_client import START_S, Answer, Client, Counts, Job, Unreachable
from siftline.scoring.engines.server_replies import (
    BAD_REPLY,
    REFUSED,
    ROUTES,
    Draw,
    NoAnswer,
    Route,
    draw_body,
    one_line,
    read_draw,
)
from siftline.scoring.fingerprint import model_digest, model_fingerprint
from siftline.scoring.recorder import Pull, fitting
from siftline.scoring.spans import encode, start_token, stop_tokens
from siftline.scoring.templates import load_tokenizer

logger = logging.getLogger(__name__)

PROBE = "What is 6 times 7?"
PROBE_TRIES = 3


class ServerEngine:
    """Scores and samples with an endpoint. See `engines.Engine`; it does not embed.

    Attributes:
        requests: Requests sent so far.
        retries: Those of them that asked again for a row.
        failed: Rows (and draws) that got no answer.
        route: The way to scores that the endpoint takes; see `server_replies`.
    """

    def __init__(self, spec: ModelSpec) -> None:
        """Meets the server: finds its model and the way to scores.

        Raises:
            ValueError: if the tokenizer is missing, nothing names the weights, the server does not
                answer or does not list the model, or it gives no scores of prompt tokens.
        """
        assert spec.server is not None
        if spec.adapter is not None:
            raise ValueError(
                f"the server engine takes no adapter ({spec.adapter!r}): let the server apply it, "
                "and name base and adapter in revision"
            )
        model_digest(spec)  # refuses a model that nothing names before anything is sent
        self.spec = spec
        self.tokenizer = load_tokenizer(spec)
        self._ends = sorted(stop_tokens(self.tokenizer) | _model_ends(spec))
        self._spell = lru_cache(maxsize=1 << 16)(lambda token: self.tokenizer.decode([token]))
        self.requests = self.retries = self.failed = 0
        self._client = Client(spec.server, _key(spec.server))
        try:
            self._meet(spec.server)
        except BaseException as error:
            self._client.close()
            if isinstance(error, RuntimeError | NoAnswer):
                raise ValueError(f"can't use {self._client.url}: {_words(error)}") from error
            raise
        logger.info("%s scores by %s on %s", self._client.url, self.route.name, self._kind)

    @property
    def slots(self) -> int:
        """Draws of a stream that are under way at a time: the server's concurrency."""
        return self._client.server.concurrency

    @property
    def details(self) -> frozenset[Detail]:
        """Top-1 hits where the server tells the rank of a prompt token."""
        return frozenset(("top1",)) if self._ranks else frozenset()

    def score(
        self, tokens: Sequence[Sequence[int]], spans: Sequence[Span]
    ) -> list[np.ndarray | Failed]:
        """Log-probabilities of the tokens in each row's span, float32 (L,) a row.

        Raises:
            ValueError: if a row is longer than `max_length` or a span is not within its row.
            RuntimeError: if the server stays away, or no longer takes our key or model.
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

        A row is sent only up to the end of its span: what follows cannot change its scores.

        Raises:
            ValueError: as `score`; or if something is wanted that the server does not tell.
            RuntimeError: as `score`.
        """
        check_details("server", wanted, self.details)
        check_rows(tokens, self.max_length)
        check_spans(tokens, spans)
        none = np.zeros(0, np.float32)
        out: list[Inspection | Failed] = [Inspection(none, top1=none > 0) for _ in tokens]
        asked = [i for i, span in enumerate(spans) if len(positions(span))]
        jobs = [
            self._job(self.route, tokens[i][: spans[i][-1]], spans[i], "top1" in wanted)
            for i in asked
        ]
        answers = self._ask(jobs)
        for i, found in zip(asked, answers, strict=True):
            out[i] = found
        return out

    def choices(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Summed log-probability of each option after each prompt, float32 (prompts, options).

        One request a pair. A row of NaN is a prompt that got no answer.
        """
        check_options(options)
        return score_options(self, prompts, options)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> list[list[Generation | Failed]]:
        """Draws len(seeds[i]) texts for prompt i, one request each. Seeds are 0 to 2**63 - 1.

        Raises:
            ValueError: if a prompt leaves no room for an answer.
            RuntimeError: as `score`.
        """
        check_rows(prompts, self.max_length, room=1)
        jobs = [
            self._draw_job(prompt, seed, sampling)
            for prompt, own in zip(prompts, seeds, strict=True)
            for seed in own
        ]
        drawn = self._ask(jobs)
        return by_prompt(drawn, seeds)

    def stream(self, pull: Pull, sampling: Sampling) -> Iterator[tuple[Any, Generation | Failed]]:
        """Draws what `pull` gives as connections come free. See `recorder.Streaming`.

        A prompt that leaves no room for an answer is refused alone.

        Raises:
            RuntimeError: as `score`.
        """
        call, begun = self._client.begin(), 0
        flying: dict[Future[Generation | Failed], Any] = {}
        try:
            while True:
                given = pull(self.slots - len(flying), not flying)
                if not given and not flying:
                    return
                asked, refused = fitting(given, self.max_length)
                yield from refused
                if not asked and not flying:
                    continue
                for name, tokens, seed in asked:
                    job = self._draw_job(tokens, seed, sampling)
                    flying[self._client.start(begun, job, call)] = name
                    begun += 1
                ended, _ = wait(flying, return_when=FIRST_COMPLETED)
                for future in sorted(ended, key=flying.__getitem__):
                    yield flying.pop(future), future.result()
        finally:
            for future in flying:
                future.cancel()
            self._count(call.counts, begun)

    def _draw_job(self, prompt: Sequence[int], seed: int, sampling: Sampling) -> Job[Generation]:
        room = self.max_length - len(prompt)
        body = draw_body(sampling, int(seed), self._ends, room)
        sent, most = list(map(int, prompt)), body["max_tokens"]
        return Job(
            {"model": self.model, "prompt": sent, **body},
            lambda reply: self._generation(read_draw(reply, len(sent), most), sampling.stop),
        )

    def embed(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """Refuses: no endpoint pools hidden states with RDS+'s weights by position."""
        raise ValueError(
            "the server engine does not embed: give the embedder engine: transformers "
            "or engine: sentence-transformers"
        )

    def fingerprint(self) -> str:
        """Hash of weights or revision, dtype, template, the server's kind, route, and our version.

        Neither the address nor the name of the model counts. The dtype is the recipe's word: a
        server that is started again with another one, or quantized, can't be told from before;
        name such a change in the revision.
        """
        return model_fingerprint(
            self.spec, "server", f"{self._kind}, {self.route.name}, engine {versions.SERVER}"
        )

    def close(self) -> None:
        """Closes the connections; the server runs on."""
        self._client.close()

    def __enter__(self) -> "ServerEngine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _meet(self, server: Server) -> None:
        """Finds the model's name and window, the kind of server, and the open route."""
        url = self._client.url
        found = _listed(self._client.get(f"{url}/models"), server)
        self.model = found["id"]
        if found.get("parent") and not self.spec.revision:
            raise RuntimeError(
                f"model {self.model!r} is an adapter on {found['parent']!r}, which the weights at "
                "path don't tell: name base and adapter in the model's revision"
            )
        window = found.get("max_model_len")
        if window is not None and not (type(window) is int and window > 2):
            raise RuntimeError(f"it says that {self.model!r} takes {window!r} tokens: check it")
        limit = self.spec.max_length
        # One token is always generated, so a row must leave room for it.
        self.max_length = limit if window is None else min(limit, window - 1)
        said = self._client.get(f"{url.removesuffix('/v1')}/version")
        version = said.get("version") if isinstance(said, dict) else None
        release = ".".join(str(version).split(".")[:2]) if version else "of unknown version"
        self._kind = f"{one_line(str(found.get('owned_by') or 'server'))} {one_line(release)}"
        self._ranks = False  # until it is known whether they come
        self.route, self._ranks = self._open_route()

    def _open_route(self) -> tuple[Route, bool]:
        """The first route by which a short row gets scores, and whether ranks come with them."""
        row = [start_token(self.tokenizer), *encode(self.tokenizer, PROBE)][: self.max_length]
        closed = []
        for route in ROUTES:
            job = self._job(route, row, (1, len(row)), top1=True)
            patience = min(START_S, self._client.server.patience_s)
            (found,), counts = self._client.ask([job], tries=PROBE_TRIES, patience_s=patience)
            if not isinstance(found, Failed):
                self._client.proof = job.body
                return route, found.top1 is not None
            why = f"{found.reason} ({counts.said})" if counts.said else found.reason
            if found.reason not in (REFUSED, BAD_REPLY, NO_SCORES):
                # Says nothing about the route, and another route is another fingerprint.
                raise RuntimeError(f"the test of {route.name} ended in {why}: run again")
            closed.append(f"{route.name}: {why}")
        raise RuntimeError(
            f"it gives no log-probabilities of prompt tokens ({'; '.join(closed)}): serve the "
            "model with vLLM, or another server that knows echo with logprobs"
        )

    def _job(self, route: Route, row: Sequence[int], span: Span, top1: bool) -> Job[Inspection]:
        sent = [int(token) for token in row]
        body = {"model": self.model, "prompt": sent, **route.body}
        return Job(body, partial(self._inspection, route, sent, positions(span), top1))

    def _inspection(
        self, route: Route, row: list[int], inside: np.ndarray, top1: bool, reply: Any
    ) -> Inspection:
        scores = route.read(reply, row, self._spell)
        ranks = scores.ranks if top1 else None
        if top1 and self._ranks and ranks is None:
            raise NoAnswer(BAD_REPLY, "ranks are missing, which came before")
        return Inspection(
            scores.logprobs[inside], top1=None if ranks is None else ranks[inside] == 1
        )

    def _ask(self, jobs: Sequence[Job[Answer]]) -> list[Answer | Failed]:
        """Asks, adds up what it took, and says so if anything went wrong."""
        answers, counts = self._client.ask(jobs)
        self._count(counts, len(jobs))
        return answers

    def _count(self, counts: Counts, jobs: int) -> None:
        failed = counts.failed.total()
        self.requests += counts.requests
        self.retries += counts.retries
        self.failed += failed
        if counts.retries or failed:
            logger.warning(
                "%s: %d of %d rows failed %s; %d requests, %d of them retries%s",
                self._client.url,
                failed,
                jobs,
                dict(sorted(counts.failed.items())),
                counts.requests,
                counts.retries,
                f"; it said: {counts.said}" if counts.said else "",
            )

    def _generation(self, draw: Draw, stop: tuple[str, ...]) -> Generation:
        """Cuts the text as the other engines do, from the tokens where the server gives them."""
        text = draw.text
        if draw.tokens is not None:
            ended = bool(draw.tokens) and draw.tokens[-1] in self._ends
            body = draw.tokens[:-1] if ended else draw.tokens
            text = self.tokenizer.decode(body, skip_special_tokens=True)
        cut = min((text.find(s) for s in stop if s in text), default=len(text))
        return Generation(text[:cut], draw.n_tokens, draw.finish_reason)


def _key(server: Server) -> str | None:
    if server.key_variable is None:
        return None
    key = os.environ.get(server.key_variable)
    if not key:
        raise ValueError(f"{server.key_variable} is not set: put the server's API key there")
    if not all("!" <= letter <= "~" for letter in key):  # said here, for httpx would quote it
        raise ValueError(
            f"{server.key_variable} holds what no API key has (a space, a line break, a letter "
            "beyond ASCII): set it again"
        )
    return key


def _listed(said: Any, server: Server) -> Mapping[str, Any]:
    """The entry of the wanted model, or of the only one.

    Raises:
        RuntimeError: if the answer is no list of models, or does not hold the wanted one.
    """
    data = said.get("data") if isinstance(said, dict) else None
    if not isinstance(data, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("id"), str) for entry in data
    ):
        raise RuntimeError("it lists no models; the address must end before /models, say in /v1")
    names = ", ".join(one_line(entry["id"]) for entry in data[:8])
    fitting = [entry for entry in data if server.model in (None, entry["id"])]
    if len(fitting) != 1:
        wanted = "no model named" if server.model is None else f"model {server.model!r} not there"
        raise RuntimeError(f"{wanted}: set server's model to one of {names or 'none at all'}")
    return fitting[0]


def _model_ends(spec: ModelSpec) -> frozenset[int]:
    """Ends of sequence that the model's configuration names, where `path` holds one."""
    for name in ("generation_config.json", "config.json"):
        file = Path(check_directory(spec)) / name
        if file.is_file():
            ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return frozenset()


def _words(error: BaseException) -> str:
    if isinstance(error, NoAnswer):
        return f"{error.reason} ({error.said})" if error.said else error.reason
    if isinstance(error, Unreachable):
        return f"{error}; or correct its url"
    return str(error)
