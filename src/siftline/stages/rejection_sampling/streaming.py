"""Draws made without waiting for one another, on engines that take new ones at any moment.

One thread for each engine pulls draws from a campaign as slots come free. A finished draw is
written to its bucket's journal before the thread waits for the next, so a killed process loses only
draws that had not ended. What is in the store already is taken from there. In which order draws end
decides nothing: a trial reads them in draw order, and a limit gives room in an order of its own.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from siftline.scoring.engines import Failed, Generation, Sampling
from siftline.scoring.recorder import Recorder
from siftline.scoring.samples import RECORD, sample_store, seed_of, text_of
from siftline.scoring.streaming import Ask
from siftline.stages.rejection_sampling.campaign import Campaign
from siftline.stages.rejection_sampling.trials import Outcome
from siftline.store import Store, score_key

Draw = tuple[str, int, Generation]
"""Prompt id, index and text of an ended draw."""
Judge = Callable[[Sequence[Draw]], list[Outcome]]
"""Says what each draw is worth."""


@dataclass(frozen=True)
class Prompt:
    """Where a prompt's draws are stored, and its token ids."""

    bucket: int
    tokens: Sequence[int]


@dataclass
class Made:
    """What a campaign's draws cost.

    Attributes:
        computed: Draws that a model made now.
        found: Draws that were in the store.
        tokens: Tokens generated now.
        lost: Reason by prompt id of those that the engine gave no draw for.
    """

    computed: int = 0
    found: int = 0
    tokens: int = 0
    lost: dict[str, str] = field(default_factory=dict)


def stream_campaign(
    recorders: Sequence[Recorder],
    campaign: Campaign,
    prompts: Mapping[str, Prompt],
    sampling: Sampling,
    seed: int,
    judge: Judge,
    *,
    guess: bool,
) -> Made:
    """Runs a campaign to its end on streaming engines of one model.

    Holds the leases of all buckets in use until it ends. Memory: all draws of these buckets.

    Args:
        recorders: One for each copy of the model; their engines are `Streaming`.
        campaign: What to draw; may be held within limits.
        prompts: By prompt id.
        sampling: How to draw.
        seed: The run's seed.
        judge: Called with one draw at a time, in any order.
        guess: Fill idle slots with draws that may turn out not to be needed.
    """
    with ExitStack() as stack:
        buckets = sorted({prompts[prompt].bucket for prompt in campaign.trials})
        store = sample_store(recorders[0], sampling)
        store.files.stamp()
        journals = _Journals(store, buckets, stack)
        state = _State(campaign, prompts, seed, judge, guess, journals, recorders[0])
        if len(recorders) == 1:
            _pull_from(recorders[0], state, sampling)
        else:
            pool = stack.enter_context(ThreadPoolExecutor(len(recorders), "stream"))
            running = [pool.submit(_pull_from, r, state, sampling) for r in recorders]
            try:
                wait(running)
            except BaseException as error:  # an interrupt must reach the threads
                state.give_up(error)
                raise
            if state.error is not None:
                raise state.error
        return state.made


def _pull_from(recorder: Recorder, state: "_State", sampling: Sampling) -> None:
    try:
        for (prompt, draw), given in recorder.engine.stream(state.pull, sampling):
            state.ended(prompt, draw, given)
    except BaseException as error:
        state.give_up(error)
        raise
    finally:
        state.flush()


class _Journals:
    """The store's records by bucket, and a writer for each that commits what has ended."""

    def __init__(self, store: Store, buckets: Sequence[int], stack: ExitStack) -> None:
        self.append = {b: stack.enter_context(store.writer(b)) for b in buckets}  # rising: no ring
        self.known = {b: {r["key"]: r for r in store.read(b).to_dicts()} for b in buckets}
        self.waiting: dict[int, list[dict[str, Any]]] = {}

    def put(self, bucket: int, record: dict[str, Any]) -> None:
        self.known[bucket][record["key"]] = record
        self.waiting.setdefault(bucket, []).append(record)

    def flush(self) -> None:
        while self.waiting:
            bucket, records = self.waiting.popitem()
            self.append[bucket](pa.Table.from_pylist(records, schema=RECORD))


class _State:
    """What the threads share: campaign and journals under one lock."""

    def __init__(
        self,
        campaign: Campaign,
        prompts: Mapping[str, Prompt],
        seed: int,
        judge: Judge,
        guess: bool,
        journals: _Journals,
        recorder: Recorder,
    ) -> None:
        self.campaign, self.prompts, self.seed = campaign, prompts, seed
        self.judge, self.guess = judge, guess
        self.journals, self.recorder = journals, recorder
        self.made, self.flying = Made(), 0
        self.error: BaseException | None = None
        self.change = threading.Condition()

    def pull(self, slots: int, idle: bool) -> list[Ask]:
        with self.change:
            self.journals.flush()
            while True:
                if self.error is not None:
                    raise RuntimeError("another engine of this model failed") from self.error
                asked = self._asked(slots)
                if asked or not idle or not self.flying:
                    self.flying += len(asked)
                    if not asked:
                        self.change.notify_all()
                    return asked
                self.change.wait()

    def _asked(self, slots: int) -> list[Ask]:
        """Up to that many draws that the store does not have; those it has are read on the way."""
        out: list[Ask] = []
        while len(out) < slots:
            taken = self.campaign.take(slots - len(out), guess=self.guess)
            if not taken:
                break
            for prompt, draw in taken:
                home = self.prompts[prompt]
                number = seed_of(self.seed, prompt, draw)
                record = self.journals.known[home.bucket].get(score_key(home.tokens, number))
                if record is None:
                    out.append(((prompt, draw), home.tokens, number))
                else:
                    self.made.found += 1
                    self.recorder.tally.found += 1
                    self._read(prompt, draw, text_of(record))
        return out

    def _read(self, prompt: str, draw: int, text: Generation) -> None:
        (outcome,) = self.judge([(prompt, draw, text)])
        self.campaign.feed(prompt, draw, outcome, text.n_tokens)

    def ended(self, prompt: str, draw: int, given: Generation | Failed) -> None:
        with self.change:
            self.flying -= 1
            if isinstance(given, Failed):
                self.made.lost[prompt] = given.reason
                self.campaign.feed(prompt, draw, None)
                self.recorder.tally.failed += 1
            else:
                home = self.prompts[prompt]
                key = score_key(home.tokens, seed_of(self.seed, prompt, draw))
                self.journals.put(home.bucket, {"key": key, **asdict(given)})
                self.journals.flush()  # before it is judged, which may take long or raise
                self.made.computed += 1
                self.made.tokens += given.n_tokens
                self.recorder.tally.computed += 1
                self.recorder.tally.tokens += given.n_tokens
                self.recorder.progress(1, given.n_tokens)
                self._read(prompt, draw, given)
            self.change.notify_all()

    def flush(self) -> None:
        with self.change:
            self.journals.flush()

    def give_up(self, error: BaseException) -> None:
        with self.change:
            self.error = self.error or error
            self.change.notify_all()
