"""When a prompt's draws stop, which are made next, and what they will cost."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.kernels.draws import hash64
from siftline.selectors.preview import preview
from siftline.selectors.trials import (
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


def plain_stop(target, rule, outcomes):
    """The stopping rule as one loop over draws in order: draws used, status."""
    keys, correct, used = set(), 0, 0
    while True:
        if used >= rule.pilot:
            if len(keys) >= target:
                return used, "met"
            if used >= rule.cap:
                return used, "capped" if correct else "unsolved"
            if used and not correct:
                limit = rule.unsolved_cap
                mean = rule.prior.a / (rule.prior.a + rule.prior.b + used)
                if used >= limit if limit is not None else used + target / mean > rule.cap:
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
    play(tight, world(rates))
    assert (tight.trials["half"].status, tight.trials["half"].used) == ("capped", 64)


def test_copies_do_not_count_nor_do_near_copies_where_asked():
    say = ["the cat sat on the mat today", "the cat sat on the mat", "a dog ran far away"]
    for limit, distinct, same in ((1.0, 3, {}), (0.8, 2, {1: say[0]})):
        trial = Trial(3, Rule(cap=3, pilot=3, max_similarity=limit))
        for draw, text in enumerate(say):
            trial.feed(draw, Outcome(True, text, words_of(text)))
        assert (trial.distinct, trial.same) == (distinct, same)
    repeating = Trial(2, Rule(cap=5))
    for draw in range(5):
        repeating.feed(draw, Outcome(True, "same"))
    assert (repeating.status, repeating.distinct) == ("capped", 1)


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


def test_a_grant_finishes_the_cheapest_and_is_never_passed():
    rates = {"a": 0.9, "b": 0.5, "c": 0.1}
    rule = Rule(cap=100, prior=Beta(1, 1))
    for budget in (0, 1, 7, 30):
        campaign = Campaign.of(dict.fromkeys(rates, 3), rule)
        made = 0
        while made < budget and campaign.grant(budget - made):
            made += play(campaign, world(rates), guess=False)
            assert made <= budget
        campaign.stop()
        assert made == min(budget, sum(t.used for t in campaign.trials.values()))
        assert all(t.status != "open" for t in campaign.trials.values())


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
    campaign = Campaign.of({"a": 3}, Rule(cap=9, pilot=4))
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


def test_a_preview_of_nothing_is_nothing():
    done = Campaign.of({"a": 1}, Rule(cap=1))
    done.feed("a", 0, Outcome(True, "x"))
    said = preview(done.trials, {"a": (1, 5)})
    assert (said.prompts, said.draws.mean, said.met.mean) == (0, 0, 1)
    assert said.seconds is None


def test_order_of_prompts_changes_nothing():
    rates = {f"p{i}": i / 10 for i in range(10)}
    names = list(rates)
    random.Random(1).shuffle(names)
    rule = Rule(cap=20, pilot=2, prior=Beta(1, 2))
    both = [Campaign.of(dict.fromkeys(order, 2), rule) for order in (rates, names)]
    assert both[0].take(7, guess=True) == both[1].take(7, guess=True)
