"""Runs campaigns of draws on a model: streaming where its engine can, else in planned batches.

An engine that runs batches gets one store bucket after another, each in batches that follow from
the draws before them alone. A resumed run plans the same batches and finds the committed ones, so
it makes the same draws to the last bit; several devices take a bucket each. Under a limit such an
engine goes as far as there was room for when it began; a stream gains room with every draw that
ends. Both read the same draws.

Draws made without waiting for one another, on engines that take new ones at any moment.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from siftline.scoring.engines.base import Failed, Generation, Sampling
from siftline.scoring.measures.samples import RECORD, draw_samples, sample_store, seed_of, text_of
from siftline.scoring.recorder import MAX_ROWS, REFUSED, Ask, Recorder, Streaming
from siftline.stages.models import over_buckets
from siftline.stages.rejection_sampling.trials import Campaign, Outcome, run
from siftline.store.store import Store, score_key

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


def run_campaign(
    recorders: Sequence[Recorder],
    campaign: Campaign,
    prompts: Mapping[str, Prompt],
    sampling: Sampling,
    seed: int,
    judge: Judge,
    *,
    guess: bool,
    stream: bool = True,
) -> Made:
    """Runs a campaign to its end, or as far as it has room for, on the copies of one model.

    Args:
        recorders: One for each copy.
        campaign: What to draw.
        prompts: By prompt id; may hold more than the campaign's.
        sampling: How to draw.
        seed: The run's seed.
        judge: Says what draws are worth; called from one thread at a time.
        guess: Also make draws that may turn out not to be needed, rather than leave slots idle.
        stream: Let engines that can take new draws at any moment do so.

    Raises:
        RuntimeError: if the engine gave no draw for some prompt, other than by refusing it, or
            refused all of them; what was drawn is kept.
    """
    if stream and all(isinstance(r.engine, Streaming) for r in recorders):
        made = stream_campaign(recorders, campaign, prompts, sampling, seed, judge, guess=guess)
    else:
        made = _in_batches(recorders, campaign, prompts, sampling, seed, judge, guess)
    lost = {prompt: why for prompt, why in made.lost.items() if why != REFUSED}
    if lost:
        first = min(lost)
        raise RuntimeError(
            f"{len(lost)} prompts got no draw, first {first} ({lost[first]}): run again, what "
            "was drawn is kept"
        )
    if made.lost and len(made.lost) == len(campaign.trials):
        raise RuntimeError(
            f"the sampler refused all {len(made.lost)} prompts: check the model and max_new_tokens"
        )
    return made


def _in_batches(
    recorders: Sequence[Recorder],
    campaign: Campaign,
    prompts: Mapping[str, Prompt],
    sampling: Sampling,
    seed: int,
    judge: Judge,
    guess: bool,
) -> Made:
    homes: dict[int, list[str]] = {}
    for prompt in campaign.trials:
        homes.setdefault(prompts[prompt].bucket, []).append(prompt)
    before = [(r.tally.computed, r.tally.found) for r in recorders]
    made, one_at_a_time = Made(), threading.Lock()

    def work(recorder: Recorder, bucket: int, mine: list[str]) -> Made:
        here = Made()
        part = campaign.part(mine)

        def draw(batch: list[tuple[str, int]]) -> Iterator[tuple[str, int, Outcome | None]]:
            wanted: dict[str, list[int]] = {}
            for prompt, index in sorted(batch):
                wanted.setdefault(prompt, []).append(index)
            tokens = {prompt: prompts[prompt].tokens for prompt in wanted}
            drawn, lost = draw_samples(recorder, bucket, tokens, wanted, sampling, seed)
            here.lost |= lost
            ended = [(line["prompt_id"], line["draw"], text_of(line)) for line in drawn.to_dicts()]
            here.tokens += sum(text.n_tokens for _, _, text in ended)
            with one_at_a_time:
                outcomes = judge(ended)
            for (prompt, index, _), outcome in zip(ended, outcomes, strict=True):
                yield prompt, index, outcome
            for prompt, index in sorted(set(batch) - {(p, j) for p, j, _ in ended}):
                yield prompt, index, None

        run(part, draw, MAX_ROWS, guess=guess)
        return here

    for _, here in over_buckets(recorders, sorted(homes.items()), work):
        made.lost |= here.lost
        made.tokens += here.tokens
    for recorder, (computed, found) in zip(recorders, before, strict=True):
        made.computed += recorder.tally.computed - computed
        made.found += recorder.tally.found - found
    return made
