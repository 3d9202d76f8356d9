"""Draws that end in any order, on engines that take new ones meanwhile, decide the same things."""

import random
import threading
import time
from dataclasses import dataclass, field

import pytest

from siftline.kernels.draws import hash64
from siftline.scoring.engines.base import Failed, Generation, ModelSpec, Sampling
from siftline.scoring.measures.samples import sample_store, seed_of
from siftline.scoring.recorder import REFUSED, Recorder, Streaming
from siftline.stages.rejection_sampling import drawing as streaming
from siftline.stages.rejection_sampling.drawing import Prompt, run_campaign
from siftline.stages.rejection_sampling.trials import Beta, Campaign, Outcome, Rule

SAMPLING = Sampling(max_new_tokens=8)
RATES = {f"{i:x}0{i:018d}": r for i, r in enumerate((0.9, 0.6, 0.3, 0.1, 0.0, 1.0))}
PROMPTS = {p: Prompt(int(p[0], 16), [i + 1, 7]) for i, p in enumerate(RATES)}
OWNER = {tuple(prompt.tokens): name for name, prompt in PROMPTS.items()}


def text_of(tokens, seed):
    rate = RATES[OWNER[tuple(tokens)]]
    right = hash64(5, OWNER[tuple(tokens)], seed) / 2**63 < rate
    return Generation(f"{'right' if right else 'wrong'} {seed % 97}", 1 + seed % 8, "stop")


class Batches:
    """An engine that answers whole batches."""

    def __init__(self):
        self.drawn = []

    def fingerprint(self):
        return "fake"

    def generate(self, prompts, seeds, sampling):
        self.drawn += [(tuple(p), s) for p, own in zip(prompts, seeds, strict=True) for s in own]
        return [[text_of(p, s) for s in own] for p, own in zip(prompts, seeds, strict=True)]


@dataclass
class Stream:
    """An engine whose draws end in an order of its own."""

    order: int = 0
    slots: int = 5
    dies_after: int | None = None
    bad: dict = field(default_factory=dict)
    drawn: list = field(default_factory=list)
    most: int = 0

    def fingerprint(self):
        return "fake"

    def stream(self, pull, sampling):
        dice, flying = random.Random(self.order), []
        while True:
            asked = pull(self.slots - len(flying), not flying)
            flying += asked
            self.most = max(self.most, len(flying))
            assert len(flying) <= self.slots
            if not flying:
                return
            name, tokens, seed = flying.pop(dice.randrange(len(flying)))
            if self.dies_after is not None and len(self.drawn) >= self.dies_after:
                raise RuntimeError("the engine died")
            self.drawn.append((tuple(tokens), seed))
            yield name, self.bad.get(name[0]) or text_of(tokens, seed)


@dataclass
class Watched(Stream):
    """Notes how many draws are under way, each time it has asked for more."""

    busy: list = field(default_factory=list)

    def stream(self, pull, sampling):
        def watching(free, idle):
            given = pull(free, idle)
            self.busy.append(self.slots - free + len(given))
            return given

        yield from super().stream(watching, sampling)


def recorder(engine, root):
    return Recorder(engine, ModelSpec(path="x", batch_tokens=64), root)


def campaign():
    return Campaign.of(dict.fromkeys(RATES, 3), Rule(cap=24, pilot=2, prior=Beta(0.5, 0.5)))


def judge(draws):
    return [Outcome(text.text.startswith("right"), f"{draw}") for _, draw, text in draws]


def standing(trials):
    return {p: (t.used, t.correct, t.status) for p, t in trials.trials.items()}


def play(engines, root, guess=True, check=judge, limits=None):
    trials = campaign()
    if limits is not None:
        trials.within(*limits, SAMPLING.max_new_tokens)
    recorders = [recorder(e, root) for e in engines]
    made = run_campaign(recorders, trials, PROMPTS, SAMPLING, 3, check, guess=guess)
    return trials, made


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    trials, _ = play([Batches()], tmp_path_factory.mktemp("batches"))
    assert {s for _, _, s in standing(trials).values()} >= {"met", "unsolved"}
    return standing(trials)


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("guess", [True, False])
def test_no_order_of_ends_changes_what_counts(tmp_path, reference, order, guess):
    engine = Stream(order, slots=1 + order)
    trials, made = play([engine], tmp_path, guess)
    assert standing(trials) == reference
    assert made.computed == len(engine.drawn) == len(set(engine.drawn))
    used = sum(used for used, _, _ in reference.values())
    assert made.computed == used if not guess else made.computed >= used
    assert engine.most == engine.slots  # kept busy


def one_after_another(draws, tokens):
    """What is read if each trial runs to its stop before the next begins; draws made, tokens."""
    trials, made, spent = campaign().trials, 0, 0
    for _, prompt in sorted((trial.wanted(), p) for p, trial in trials.items()):
        while trials[prompt].status == "open":
            if (draws is not None and made >= draws) or (
                tokens is not None and spent + SAMPLING.max_new_tokens > tokens
            ):
                break
            draw = trials[prompt].used
            text = text_of(PROMPTS[prompt].tokens, seed_of(3, prompt, draw))
            made, spent = made + 1, spent + text.n_tokens
            trials[prompt].feed(draw, judge([(prompt, draw, text)])[0])
    return {p: (t.used, t.correct, t.status) for p, t in trials.items()}, made, spent


LIMITS = [(9, None), (17, None), (None, 60), (None, 100), (21, 90), (1000, 9000)]


@pytest.mark.parametrize("limits", LIMITS)
def test_no_order_of_ends_changes_what_a_limit_leaves(tmp_path, reference, limits):
    expected, made, spent = one_after_another(*limits)
    assert (expected == reference) == (limits == LIMITS[-1])
    for order in range(3):
        engines = [Stream(order, slots=1 + order)], [Stream(order + i, slots=2) for i in range(3)]
        for i, several in enumerate(engines):
            trials, did = play(several, tmp_path / f"{order}{i}", limits=limits)
            assert standing(trials) == expected
            assert (did.computed, did.tokens) == (made, spent)
            assert not trials.within(
                None if limits[0] is None else limits[0] - made,
                None if limits[1] is None else limits[1] - spent,
                SAMPLING.max_new_tokens,
            )


@pytest.mark.parametrize("after", [1, 6, 13])
@pytest.mark.parametrize("limits", [(17, None), (None, 100)])
def test_a_limit_leaves_the_same_after_an_engine_that_died(tmp_path, limits, after):
    expected, made, _ = one_after_another(*limits)
    with pytest.raises(RuntimeError, match="the engine died"):
        play([Stream(1, dies_after=after)], tmp_path, limits=limits)
    trials, did = play([Stream(2)], tmp_path, limits=limits)
    assert standing(trials) == expected
    assert did.found == after  # all that had ended is read: none was a guess
    assert did.found + did.computed == made


def test_a_generous_limit_leaves_no_slot_idle(tmp_path):
    """Under way, each time the engine asks: as many as without a limit."""
    seen = []
    for limits in (None, (1000, 9000)):
        engine = Watched(1, slots=4)
        play([engine], tmp_path / str(limits), guess=False, limits=limits)
        seen.append(engine.busy)
    assert seen[0] == seen[1]
    assert max(seen[1]) == 4


def test_batches_and_streams_share_the_store(tmp_path, reference):
    play([Stream()], tmp_path, guess=False)
    later = Batches()
    trials, made = play([later], tmp_path, guess=False)
    assert standing(trials) == reference
    assert (later.drawn, made.computed) == ([], 0)
    assert made.found == sum(used for used, _, _ in reference.values())


@pytest.mark.parametrize("after", [0, 1, 7, 20])
def test_what_had_ended_survives_an_engine_that_dies(tmp_path, reference, after):
    with pytest.raises(RuntimeError, match="the engine died"):
        play([Stream(1, dies_after=after)], tmp_path)
    again = Stream(2)
    trials, made = play([again], tmp_path)
    assert standing(trials) == reference
    assert made.found <= after
    kept = sample_store(recorder(again, tmp_path), SAMPLING)
    assert sum(kept.read(b).height for b in range(16)) == after + len(again.drawn)


def test_several_engines_share_one_campaign(tmp_path, reference):
    engines = [Stream(1, slots=2), Stream(2, slots=2), Stream(3, slots=2)]
    trials, made = play(engines, tmp_path)
    assert standing(trials) == reference
    drawn = [d for e in engines for d in e.drawn]
    assert made.computed == len(drawn) == len(set(drawn))


def test_one_of_several_engines_that_dies_ends_the_run(tmp_path):
    ill = Stream(2, slots=2, dies_after=1)

    class Patient(Stream):
        def stream(self, pull, sampling):
            for ended in super().stream(pull, sampling):
                while not ill.drawn:  # or it may do all the work before the other begins
                    time.sleep(0.01)
                yield ended

    with pytest.raises(RuntimeError, match=r"^the engine died$"):
        play([Patient(1, slots=2), ill], tmp_path)
    assert not [t for t in threading.enumerate() if t.name.startswith("stream")]


def test_an_interrupt_reaches_every_engine(tmp_path, monkeypatch):
    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "wait", interrupted)

    class Slow(Stream):
        def stream(self, pull, sampling):
            for ended in super().stream(pull, sampling):
                time.sleep(0.05)
                yield ended

    engines = [Slow(1, slots=1), Slow(2, slots=1)]
    with pytest.raises(KeyboardInterrupt):
        play(engines, tmp_path)
    assert sum(len(e.drawn) for e in engines) < 10


def test_a_sampler_that_refuses_everything_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="refused all 6 prompts"):
        play([Stream(bad={p: Failed(REFUSED) for p in RATES})], tmp_path)


def test_a_refused_prompt_fails_alone_and_any_other_loss_is_an_error(tmp_path):
    first = next(iter(RATES))
    trials, made = play([Stream(bad={first: Failed(REFUSED)})], tmp_path / "a")
    assert made.lost == {first: REFUSED}
    assert standing(trials)[first][2] == "failed"
    assert [s for _, _, s in standing(trials).values()].count("failed") == 1
    with pytest.raises(RuntimeError, match=r"1 prompts got no draw, first 00.* \(timeout\)"):
        play([Stream(bad={first: Failed("timeout")})], tmp_path / "b")


def test_a_judge_that_raises_ends_the_run_and_keeps_the_draws(tmp_path):
    seen = []

    def broken(draws):
        seen.extend(draws)
        if len(seen) == 4:
            raise ZeroDivisionError
        return judge(draws)

    engine = Stream(1)
    with pytest.raises(ZeroDivisionError):
        play([engine], tmp_path, check=broken)
    kept = sample_store(recorder(engine, tmp_path), SAMPLING)
    assert sum(kept.read(b).height for b in range(16)) == 4


def test_a_finished_draw_is_on_disk_before_it_is_judged(tmp_path):
    """A verifier may take a minute a call, and the process may end in it."""
    engine = Stream(1)
    kept = sample_store(recorder(engine, tmp_path), SAMPLING)
    seen = []

    def slow(draws):
        seen.extend(draws)
        texts = [line["text"] for b in range(16) for line in kept.read(b).to_dicts()]
        assert sorted(texts) == sorted(text.text for _, _, text in seen)
        return judge(draws)

    play([engine], tmp_path, check=slow)
    assert len(seen) > 6


def test_both_kinds_are_told_apart():
    assert isinstance(Stream(), Streaming)
    assert not isinstance(Batches(), Streaming)
