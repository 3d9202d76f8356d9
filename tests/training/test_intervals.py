"""Intervals against published values, closed forms and simulated coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from siftline.kernels.draws import uniforms
from siftline.training.intervals import bootstrap_mean, crossed_interval, paired_difference, wilson


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_values(correct, n, low, high):
    interval = wilson(correct, n)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 2000), st.data())
def test_wilson_is_scipys_and_mirrors(n, data):
    correct = data.draw(st.integers(0, n))
    interval = wilson(correct, n, 0.9)
    theirs = stats.binomtest(correct, n).proportion_ci(0.9, method="wilson")
    assert interval.low == pytest.approx(theirs.low, abs=1e-12)
    assert interval.high == pytest.approx(theirs.high, abs=1e-12)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert wilson(n - correct, n, 0.9).low == pytest.approx(1 - interval.high)


def test_bootstrap_is_near_the_normal_interval_of_a_mean():
    ids = [f"r{i}" for i in range(400)]
    values = stats.norm.ppf(uniforms(7, "planted", ids)) + 3.0
    interval = bootstrap_mean(ids, values, seed=1)
    half = 1.96 * values.std(ddof=1) / 20
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_weights_are_poisson_of_mean_one():
    # One row worth 1 among rows worth 0: the mean is w_0 / sum(w); zero in exp(-1) of resamples.
    ids = [f"r{i}" for i in range(200)]
    values = np.zeros(200)
    values[0] = 200.0
    below = bootstrap_mean(ids, values, seed=3, confidence=0.36).low  # 32 % quantile
    above = bootstrap_mean(ids, values, seed=3, confidence=0.16).low  # 42 % quantile
    assert below == 0.0
    assert above > 0.0


def test_bootstrap_ignores_row_order_and_follows_the_seed():
    ids = [f"r{i}" for i in range(50)]
    values = uniforms(0, "values", ids)
    shuffled = np.argsort(uniforms(1, "shuffle", ids))
    first = bootstrap_mean(ids, values, seed=5, resamples=200)
    second = bootstrap_mean([ids[i] for i in shuffled], values[shuffled], seed=5, resamples=200)
    assert first == second
    assert first != bootstrap_mean(ids, values, seed=6, resamples=200)


def test_a_paired_difference_is_narrower_than_two_intervals():
    ids = [f"q{i}" for i in range(300)]
    hard = uniforms(2, "hard", ids)
    first = (hard < 0.60).astype(float)
    second = (hard < 0.55).astype(float)  # right on a subset of what the first is right on
    paired = paired_difference(ids, first, second, seed=0)
    assert paired.estimate == pytest.approx(first.mean() - second.mean())
    assert 0 < paired.low < paired.estimate < paired.high
    apart = wilson(int(first.sum()), 300)
    assert paired.high - paired.low < (apart.high - apart.low) / 2
    same = paired_difference(ids, first, first, seed=0)
    assert (same.low, same.high) == (0.0, 0.0)


def test_crossed_interval_is_the_t_interval_when_questions_do_not_vary():
    means = np.array([0.4, 0.5, 0.55])
    interval = crossed_interval(np.repeat(means[:, None], 10, axis=1))
    theirs = stats.t.interval(0.95, 2, means.mean(), stats.sem(means))
    assert (interval.low, interval.high) == pytest.approx(theirs)


def test_crossed_interval_covers_what_it_promises():
    # Truth 0.5; seeds shift every question, questions have their own level: both are drawn anew.
    covered = 0
    for trial in range(300):
        seeds = stats.norm.ppf(uniforms(trial, "seeds", ["a", "b", "c"])) * 0.05
        questions = stats.norm.ppf(uniforms(trial, "questions", [str(i) for i in range(80)])) * 0.3
        noise = uniforms(trial, "noise", [str(i) for i in range(240)]).reshape(3, 80) - 0.5
        interval = crossed_interval(0.5 + seeds[:, None] + questions[None, :] + noise)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.92 <= covered / 300 <= 0.995


@settings(max_examples=50)
@given(st.integers(2, 5), st.integers(2, 30), st.integers(0, 99))
def test_crossed_interval_holds_its_mean_and_ignores_order(k, n, seed):
    values = uniforms(seed, "values", [str(i) for i in range(k * n)]).reshape(k, n)
    interval = crossed_interval(values)
    assert interval.low <= values.mean() <= interval.high
    turned = crossed_interval(values[::-1, ::-1])
    assert (turned.low, turned.high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(1, 0),
        lambda: wilson(3, 2),
        lambda: wilson(1, 2, 1.0),
        lambda: bootstrap_mean(["a", "a"], np.zeros(2), seed=0),
        lambda: bootstrap_mean(["a"], np.zeros(1), seed=0),
        lambda: bootstrap_mean(["a", "b"], np.zeros(3), seed=0),
        lambda: crossed_interval(np.zeros((1, 5))),
    ],
)
def test_bad_input_is_refused_with_a_remedy(call):
    with pytest.raises(ValueError, match=r"need|give|must"):
        call()
