"""Pass rates of trials that their own rule ended."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.stages.rejection_sampling.difficulty import (
    PASS_RATES,
    difficulty,
    rates_at_the_end,
    stopped_difficulty,
)
from siftline.stages.rejection_sampling.trials import Beta, Outcome, Rule, Trial


def rows_of(trials):
    """Pass rates and states of trials, as the stage's table has them."""
    rows = [(p, t.used, t.correct, t.distinct, t.status) for p, t in trials.items()]
    return pl.DataFrame(rows, schema={**PASS_RATES, "status": pl.String}, orient="row")


@pytest.mark.parametrize(("p", "k", "cap"), [(0.1, 3, 24), (0.3, 4, 24), (0.5, 4, 400)])
def test_a_stopped_trial_neither_flatters_its_prompt_nor_runs_it_down(p, k, cap):
    """Over many prompts of one rate, the mean of 1 - difficulty is the rate."""
    rng = np.random.default_rng(0)
    rule = Rule(cap, 4, Beta(0.5, 1.0))
    trials = {f"p{i:04d}": Trial(k, rule) for i in range(4000)}
    for trial in trials.values():
        while trial.status == "open":
            trial.feed(trial.used, Outcome(bool(rng.random() < p), str(trial.used)))
    found = 1 - stopped_difficulty(rows_of(trials), trials)["difficulty"].mean()
    plain = 1 - difficulty(rows_of(trials))["difficulty"].mean()
    assert found == pytest.approx(p, abs=0.012)
    assert abs(plain - p) > 2 * abs(found - p)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 5),
    st.integers(1, 4),
    st.none() | st.integers(4, 9),
    st.floats(0.02, 0.98),
    st.floats(0.2, 3),
)
def test_rates_at_the_end_have_no_bias_and_are_the_share_over_all_orders(k, pilot, unsolved, p, a):
    rule = Rule(9, pilot, Beta(a, 1.0), unsolved)
    found = rates_at_the_end(rule, k)
    ends, mean = {}, 0.0
    for bits in range(2**9):
        outcomes = [bool(bits >> draw & 1) for draw in range(9)]
        trial = Trial(k, rule)
        for draw, right in enumerate(outcomes):
            trial.feed(draw, Outcome(right, str(draw)))
        end = (trial.used, trial.distinct)
        # Of each end, as many sequences as the draws behind it may show.
        ends.setdefault(end, []).append(sum(outcomes[:pilot]) / pilot)
        right = sum(outcomes)
        mean += p**right * (1 - p) ** (9 - right) * found[end]
    assert mean == pytest.approx(p)
    assert found == pytest.approx({end: np.mean(shares) for end, shares in ends.items()})


def test_a_target_that_nothing_else_ends_has_the_rate_of_the_negative_binomial():
    rule = Rule(10_000, 4, Beta(0.5, 1.0))
    found = rates_at_the_end(Rule(200, 4, Beta(50.0, 0.1)), 3)
    assert found[20, 3] == pytest.approx(2 / 19)
    trial = Trial(1, rule)
    for draw in range(6):
        trial.feed(draw, Outcome(draw == 5, "x"))
    late, never = trial, Trial(2, Rule(6, 3))
    for draw in range(6):
        never.feed(draw, Outcome(False, str(draw)))
    trials = {"late": late, "never": never}
    rates = stopped_difficulty(rows_of(trials), trials)["difficulty"].to_list()
    assert rates == pytest.approx([5 / 6, 1.0])  # neither unsolvable nor unmeasured


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.lists(st.booleans(), min_size=24, max_size=24))
def test_a_rate_is_0_only_without_a_success(k, pilot, outcomes):
    trial = Trial(k, Rule(cap=24, pilot=pilot))
    for draw, right in enumerate(outcomes):
        trial.feed(draw, Outcome(right, str(draw // 2)))  # some are copies
    (found,) = stopped_difficulty(rows_of({"p": trial}), {"p": trial})["difficulty"]
    assert (found == 1) == (trial.correct == 0)
    assert 0 <= found <= 1
