"""When a prompt's draws stop, which are made next, and what they will cost."""

import random
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.kernels.draws import hash64
from siftline.stages.rejection_sampling.preview import NODES, _cost, preview
from siftline.stages.rejection_sampling.run import _room
from siftline.stages.rejection_sampling.trials import (
    Beta,
    Campaign,
    Outcome,
    Rule,
    Trial,
    fit_prior,
    run,
    words_of,
)


def luck(prompt, draw, seed=0):
    """A uniform number that belongs to a draw."""
    return hash64(seed, prompt, draw) / 2**63


def world(rates, seed=0, copies=0):
    """Draws that succeed by the prompt's rate; every `copies`-th repeats the one before."""

    def outcome(prompt, draw):
        key = f"{draw - 1 if copies and draw % copies == 0 and draw else draw}"
        return Outcome(luck(prompt, draw, seed) < rates[prompt], key)

    return outcome


def play(campaign, outcome, slots=32, guess=True):
    return run(
        campaign, lambda batch: [(p, j, outcome(p, j)) for p, j in batch], slots, guess=guess
    )


def given_up(rule, used, distinct, target):
    """The rule as it is written: expected cost above the cap, or a number for the unsolved."""
    if rule.unsolved_cap is not None and not distinct:
        return used >= rule.unsolved_cap
    mean = (rule.prior.a + distinct) / (rule.prior.a + rule.prior.b + used)
    return used + (target - distinct) / mean > rule.cap


def plain_stop(target, rule, outcomes):
    """The stopping rule as one loop over draws in order: draws used, status."""
    keys, correct, used = set(), 0, 0
    while True:
        if used >= rule.pilot:
            if len(keys) >= target:
                return used, "met"
            if used >= rule.cap:
                return used, "capped" if correct else "unsolved"
            if used and given_up(rule, used, len(keys), target):
                return used, "unsolved"
        ok, key = outcomes[used]
        used += 1
        correct += ok
        if ok:
            keys.add(key)


RULES = st.builds(
    lambda cap, pilot, a, b, unsolved: Rule(
        cap, min(pilot, cap), Beta(a, b), None if unsolved is None else min(unsolved, cap)
    ),
    st.integers(1, 24),
    st.integers(0, 6),
    st.floats(0.1, 3),
    st.floats(0.1, 3),
    st.none() | st.integers(1, 24),
)
DRAWS = st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef")), min_size=24, max_size=24)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 6), RULES, DRAWS, st.randoms(use_true_random=False))
def test_a_trial_is_the_plain_loop_whatever_the_order_of_arrival(target, rule, outcomes, order):
    used, status = plain_stop(target, rule, outcomes)
    arrivals = list(range(len(outcomes)))
    order.shuffle(arrivals)
    trial = Trial(target, rule)
    for draw in arrivals:
        trial.feed(draw, Outcome(*outcomes[draw]))
    assert (trial.used, trial.status) == (used, status)
    assert trial.correct == sum(ok for ok, _ in outcomes[:used])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), RULES, DRAWS)
def test_certain_draws_are_read_and_never_too_few_to_go_on(target, rule, outcomes):
    trial = Trial(target, rule)
    while trial.status == "open":
        sure, at = trial.certain(), trial.used
        assert 1 <= sure <= rule.cap - at
        for draw in range(at, at + sure):
            trial.feed(draw, Outcome(*outcomes[draw]))
        assert trial.used == at + sure
    assert trial.certain() == trial.wanted() == 0


def ends(target, rule, used=0, distinct=0):
    """The earliest and the latest draw at which any sequence of outcomes may stop a trial."""
    if used >= rule.pilot and (
        distinct >= target or used >= rule.cap or (used and given_up(rule, used, distinct, target))
    ):
        return used, used
    wrong, right = (ends(target, rule, used + 1, distinct + more) for more in (0, 1))
    return min(wrong[0], right[0]), max(wrong[1], right[1])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 5),
    st.builds(
        lambda cap, pilot, a, b, unsolved: Rule(
            cap, min(pilot, cap), Beta(a, b), None if unsolved is None else min(unsolved, cap)
        ),
        st.integers(1, 9),
        st.integers(0, 4),
        st.floats(0.1, 6),
        st.floats(0.01, 3),
        st.none() | st.integers(1, 9),
    ),
    st.lists(st.booleans(), max_size=9),
)
def test_every_sequence_of_outcomes_reads_what_is_certain_and_no_more_than_the_most(
    target, rule, outcomes
):
    trial = Trial(target, rule)
    for draw, right in enumerate([*outcomes, None]):
        first, last = ends(target, rule, trial.used, trial.distinct)
        if trial.status != "open":
            assert first == last == trial.used
            assert trial.certain() == trial.most() == trial.wanted() == 0
            break
        assert trial.certain() == first - trial.used
        most = trial.most()
        assert most >= last - trial.used
        if rule.unsolved_cap is None and target - trial.distinct == 1:
            assert most == last - trial.used  # with more missing, an end may be out of reach
        assert trial.certain() <= trial.wanted() <= most or trial.wanted() <= trial.certain()
        if right is not None:
            trial.feed(draw, Outcome(right, str(draw)))


def test_a_late_first_success_may_end_a_trial_that_goes_by_a_number_until_then():
    rule = Rule(cap=24, pilot=2, prior=Beta(0.5, 0.5), unsolved_cap=20)
    trial = Trial(4, rule)
    # One answer of n: n + 3 (n + 1) / 1.5 passes 24 at the eighth draw.
    assert trial.certain() == 4
    for draw in range(7):
        trial.feed(draw, Outcome(False, str(draw)))
    assert (trial.status, trial.certain(), trial.most()) == ("open", 1, 13)
    silent = Trial(4, rule)
    for draw in range(20):
        silent.feed(draw, Outcome(False, str(draw)))
    assert (silent.status, silent.used) == ("unsolved", 20)
    trial.feed(7, Outcome(True, "7"))
    assert (trial.status, trial.used, trial.distinct) == ("unsolved", 8, 1)


def test_a_prompt_with_successes_is_given_up_when_its_expected_cost_passes_the_cap():
    """1 of n at Beta(1, 1): n + 3 (n + 2) / 2 passes 32 at the twelfth draw."""
    trial = Trial(4, Rule(cap=32, pilot=4, prior=Beta(1, 1)))
    for draw in range(32):
        assert (trial.status == "open") == (draw < 12)
        trial.feed(draw, Outcome(draw == 1, str(draw)))
    assert (trial.status, trial.used, trial.distinct) == ("unsolved", 12, 1)


def test_prompts_that_hardly_ever_succeed_are_given_up_long_before_the_cap():
    """Planted: 4 answers at a rate of 0.03 cost 133 draws, the cap is 32."""
    rates = {f"rare{i:03d}": 0.03 for i in range(300)} | {f"good{i:03d}": 0.6 for i in range(100)}
    campaign = Campaign.of(dict.fromkeys(rates, 4), Rule(cap=32, pilot=4, prior=Beta(0.5, 1.0)))
    made = play(campaign, world(rates), guess=False)
    rare = [t for p, t in campaign.trials.items() if p.startswith("rare")]
    assert sum(t.status == "unsolved" for t in rare) >= 297
    assert {t.correct for t in rare if t.status == "unsolved"} >= {0, 1}
    assert np.mean([t.used for t in rare]) < 10
    assert made == sum(t.used for t in campaign.trials.values())
    good = [t.status for p, t in campaign.trials.items() if p.startswith("good")]
    assert good.count("met") >= 95


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40))
def test_batch_size_and_guesses_change_what_is_wasted_and_nothing_that_counts(seed, one, other):
    rates = {f"p{i}": r for i, r in enumerate((0.9, 0.5, 0.2, 0.05, 0.0))}
    rule = Rule(cap=40, pilot=4, prior=Beta(0.5, 0.5))
    seen = []
    for slots, guess in ((one, True), (other, True), (other, False)):
        campaign = Campaign.of(dict.fromkeys(rates, 3), rule)
        made = play(campaign, world(rates, seed, copies=3), slots, guess)
        seen.append({p: (t.used, t.correct, t.status) for p, t in campaign.trials.items()})
        needed = sum(t.used for t in campaign.trials.values())
        assert made >= needed
        assert guess or made == needed
    assert seen[0] == seen[1] == seen[2]


def test_mean_draws_are_k_over_p():
    """The negative binomial's mean, over many prompts of one rate."""
    for p, k in ((0.5, 4), (0.1, 3)):
        rates = {f"p{i:04d}": p for i in range(2000)}
        campaign = Campaign.of(dict.fromkeys(rates, k), Rule(cap=10_000, prior=Beta(1, 1)))
        made = play(campaign, world(rates), 512, guess=False)
        assert {t.status for t in campaign.trials.values()} == {"met"}
        assert made / 2000 == pytest.approx(k / p, rel=4 * ((1 - p) / k / 2000) ** 0.5)


def test_targets_are_met_exactly_caps_hold_and_the_unsolvable_are_found():
    rates = {"sure": 1.0, "half": 0.5, "rare": 0.1, "never": 0.0}
    rule = Rule(cap=64, pilot=4, prior=Beta(1, 1))
    campaign = Campaign.of(dict.fromkeys(rates, 4), rule)
    play(campaign, world(rates))
    found = {p: t.status for p, t in campaign.trials.items()}
    assert found == {"sure": "met", "half": "met", "rare": "met", "never": "unsolved"}
    # 4 answers at 1 / (n + 2): n + 4 (n + 2) passes 64 at the twelfth failure.
    assert campaign.trials["never"].used == 12
    assert campaign.trials["sure"].used == 4
    assert max(t.used for t in campaign.trials.values()) <= 64
    tight = Campaign.of({"half": 60}, rule)
    play(tight, world(rates))  # 60 at a half cost 120, which the pilot shows
    assert (tight.trials["half"].status, tight.trials["half"].used) == ("unsolved", 4)
    whole = Campaign.of({"half": 60}, Rule(cap=64, pilot=64))
    play(whole, world(rates))
    assert (whole.trials["half"].status, whole.trials["half"].used) == ("capped", 64)


def test_copies_do_not_count_nor_do_near_copies_where_asked():
    say = ["the cat sat on the mat today", "the cat sat on the mat", "a dog ran far away"]
    for limit, distinct, same in ((1.0, 3, {}), (0.8, 2, {1: say[0]})):
        trial = Trial(3, Rule(cap=3, pilot=3, max_similarity=limit))
        for draw, text in enumerate(say):
            trial.feed(draw, Outcome(True, text, words_of(text)))
        assert (trial.distinct, trial.same) == (distinct, same)
    repeating = Trial(2, Rule(cap=5, pilot=5))
    for draw in range(5):
        repeating.feed(draw, Outcome(True, "same"))
    assert (repeating.status, repeating.distinct, repeating.correct) == ("capped", 1, 5)


def test_long_trials_go_first_and_each_draw_is_taken_once():
    rates = {"easy": 0.9, "hard": 0.1}
    campaign = Campaign.of(dict.fromkeys(rates, 2), Rule(cap=50, pilot=2, prior=Beta(1, 1)))
    for prompt in rates:
        for j in range(2):
            campaign.feed(prompt, j, Outcome(prompt == "easy" and j == 0, str(j)))
    first = campaign.take(1, guess=False)
    assert first == [("hard", 2)]
    rest = campaign.take(50, guess=True)
    assert len({*first, *rest}) == len(first) + len(rest)
    assert {p for p, _ in rest} == {"easy", "hard"}
    assert rest[0] == ("hard", 3)


def test_a_draw_that_never_comes_ends_its_trial_alone():
    for order in ((0, 1), (1, 0)):  # whichever comes first
        campaign = Campaign.of({"a": 2, "b": 2}, Rule(cap=9))
        for draw in order:
            campaign.feed("a", draw, None if draw else Outcome(True, "x"))
        play(campaign, world({"b": 1.0}))
        assert {p: (t.status, t.used) for p, t in campaign.trials.items()} == {
            "a": ("failed", 1), "b": ("met", 2),
        }  # fmt: skip
    done = Campaign.of({"a": 1}, Rule(cap=9))
    done.feed("a", 5, None)  # behind the stop
    done.feed("a", 0, Outcome(True, "x"))
    assert done.trials["a"].status == "met"


def test_a_draw_that_is_missing_between_others_is_asked_for():
    campaign = Campaign.of({"a": 3}, Rule(cap=20, pilot=4))
    for draw in (0, 2, 3):
        campaign.feed("a", draw, Outcome(False, str(draw)))
    assert campaign.take(1, guess=False) == [("a", 1)]
    campaign.feed("a", 1, Outcome(True, "1"))
    assert campaign.trials["a"].used == 4
    play(campaign, world({"a": 1.0}))
    assert campaign.trials["a"].status == "met"


def test_the_prior_follows_the_pool():
    assert fit_prior(np.array([0, 0]), np.array([4, 4])).mean() == pytest.approx(0.1)
    alike = fit_prior(np.full(200, 2), np.full(200, 4))
    assert (alike.a + alike.b, alike.mean()) == (2.0, pytest.approx(0.5))
    split = fit_prior(np.array([0, 4] * 100), np.full(200, 4))
    assert split.a + split.b == 0.5  # two kinds of prompts: a draw tells which
    assert fit_prior(np.array([1]), np.array([1])).mean() == pytest.approx(2 / 3)
    rng = np.random.default_rng(3)
    p = rng.beta(0.4, 0.6, 20_000)
    found = fit_prior(rng.binomial(8, p), np.full(20_000, 8))
    assert found.a == pytest.approx(0.4, abs=0.03)
    assert found.b == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("unsolved_cap", [None, 6])
def test_the_preview_covers_what_then_happens(unsolved_cap):
    """Draws and targets met, predicted from the pilot, over many pools from the prior."""
    rule = Rule(cap=48, pilot=4, prior=Beta(0.8, 1.2), unsolved_cap=unsolved_cap)
    inside = {"draws": 0, "met": 0}
    errors = []
    for world_seed in range(60):
        rng = np.random.default_rng(world_seed)
        rates = {f"p{i:03d}": float(p) for i, p in enumerate(rng.beta(0.8, 1.2, 80))}
        outcome = world(rates, world_seed)
        campaign = Campaign.of(dict.fromkeys(rates, 3), rule)
        for prompt in rates:
            for j in range(4):
                campaign.feed(prompt, j, outcome(prompt, j))
        used = sum(t.used for t in campaign.trials.values())
        said = preview(campaign.trials, dict.fromkeys(rates, (4, 40)), 0.5)
        play(campaign, outcome)
        made = sum(t.used for t in campaign.trials.values()) - used
        met = sum(t.status == "met" for t in campaign.trials.values())
        inside["draws"] += said.draws.low <= made <= said.draws.high
        inside["met"] += said.met.low <= met <= said.met.high
        errors.append(made / said.draws.mean)
        assert said.tokens.mean == pytest.approx(10 * said.draws.mean)
        assert said.seconds.mean == pytest.approx(5 * said.draws.mean)
    assert np.mean(errors) == pytest.approx(1.0, abs=0.04)
    assert inside["draws"] >= 52  # of 60; 95 % is 57
    assert inside["met"] >= 52


@pytest.mark.parametrize(
    ("rule", "used", "distinct", "target"),
    [
        (Rule(12, 4, Beta(0.8, 1.2)), 4, 1, 3),
        (Rule(12, 4, Beta(0.8, 1.2)), 4, 0, 1),
        (Rule(12, 2, Beta(0.8, 1.2)), 2, 0, 2),
        (Rule(12, 4, Beta(0.8, 1.2), unsolved_cap=7), 4, 0, 2),
        (Rule(12, 2, Beta(2.0, 0.1)), 2, 2, 9),
        (Rule(12, 6, Beta(0.8, 1.2)), 3, 2, 1),  # in the pilot, with more than it wants
        (Rule(12, 6, Beta(0.8, 1.2), unsolved_cap=9), 3, 0, 1),
    ],
)
def test_the_preview_of_a_trial_is_the_sum_over_all_sequences(rule, used, distinct, target):
    from scipy.stats import beta

    nodes = (np.arange(NODES) + 0.5) / NODES
    p = beta.ppf(nodes, rule.prior.a + distinct, rule.prior.b + used - distinct)
    before = [(draw < distinct, str(draw)) for draw in range(used)]
    moments = np.zeros((3, NODES))
    for after in product((False, True), repeat=rule.cap - used):
        outcomes = [*before, *((right, str(used + j)) for j, right in enumerate(after))]
        end, status = plain_stop(target, rule, outcomes)
        weight = p ** sum(after) * (1 - p) ** (len(after) - sum(after))
        cost = end - used
        moments += np.array([cost, cost**2, status == "met"])[:, None] * weight
    mean, second, met = moments.mean(axis=1)
    found = _cost(rule, used, distinct, target)
    assert mean > 0
    assert found == pytest.approx((mean, second - mean**2, met), rel=1e-9, abs=1e-12)


def test_a_preview_of_nothing_is_nothing():
    done = Campaign.of({"a": 1}, Rule(cap=1))
    done.feed("a", 0, Outcome(True, "x"))
    said = preview(done.trials, {"a": (1, 5)})
    assert (said.prompts, said.draws.mean, said.met.mean) == (0, 0, 1)
    assert said.seconds is None


def test_a_plan_says_how_many_answers_the_budget_can_keep():
    campaign = Campaign.of({"a": 2, "b": 2}, Rule(cap=48, pilot=4))
    for prompt in "ab":
        for j in range(4):
            campaign.feed(prompt, j, Outcome(False, ""))
    said = preview(campaign.trials, {"a": (4, 40), "b": (4, 40)})
    assert said.answers == 4

    def room(unit, size, role="budget"):
        last = SimpleNamespace(of=SimpleNamespace(role=role))
        budget = SimpleNamespace(unit=unit, size=size)
        return _room(SimpleNamespace(stages=[last], budget=budget), said)

    assert (room("rows", 3), room("loss_tokens", 25), room("rows", 3, "gate")) == (3, 2, None)
    small = str(replace(said, room=3))
    assert "but the budget keeps about 3 of 4 answers: raise it, or lower k" in small
    assert "budget" not in str(replace(said, room=4))
    assert "budget" not in str(said)


def test_a_preview_of_a_long_trial_takes_the_answers_missing_times_the_cap():
    """3,000 draws at a known rate: the negative binomial's mean where nothing ends it."""
    mean, variance, met = _cost(Rule(3000, 4, Beta(1e6, 1e6)), 4, 0, 50)
    assert (mean, variance, met) == pytest.approx((100, 100, 1), rel=1e-3)


def test_order_of_prompts_changes_nothing():
    rates = {f"p{i}": i / 10 for i in range(10)}
    names = list(rates)
    random.Random(1).shuffle(names)
    rule = Rule(cap=20, pilot=2, prior=Beta(1, 2))
    both = [Campaign.of(dict.fromkeys(order, 2), rule) for order in (rates, names)]
    assert both[0].take(7, guess=True) == both[1].take(7, guess=True)
