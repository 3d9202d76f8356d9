"""Facility location: greedy against its definition, brute force, and the stochastic variant."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.kernels.vectors.blocks import unit
from siftline.kernels.vectors.facility import lazy_greedy, stochastic_greedy, value_of


def plain_greedy(similarities, k):
    chosen = []
    for _ in range(k):
        gains = [
            -1.0 if i in chosen else round(value_of(similarities, np.array([*chosen, i])), 7)
            for i in range(len(similarities))
        ]
        chosen.append(int(np.argmax(gains)))
    return chosen


def similarities_of(n, m, seed):
    return np.random.default_rng(seed).random((n, m)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(1, 9), st.integers(0, 2**31))
def test_lazy_is_plain_greedy_with_falling_gains(n, m, seed):
    s = similarities_of(n, m, seed)
    k = max(1, n // 2)
    found = lazy_greedy(s, k)
    assert found.rows.tolist() == plain_greedy(s, k)
    assert (np.diff(found.gains) <= 1e-6).all()
    assert found.gains.sum() == pytest.approx(value_of(s, found.rows), abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_close_to_the_best_of_all_subsets(seed):
    s = similarities_of(11, 8, seed)
    best = max(value_of(s, np.array(c)) for c in combinations(range(11), 3))
    assert value_of(s, lazy_greedy(s, 3).rows) >= (1 - 1 / np.e) * best
    assert value_of(s, lazy_greedy(s, 3).rows) >= 0.93 * best


def test_equal_gains_go_to_the_earlier_row():
    s = np.array([[0.5, 0.5], [0.5, 0.5], [1, 0]], np.float32)
    assert lazy_greedy(s, 2).rows.tolist() == [0, 2]
    assert lazy_greedy(s, 3).rows.tolist() == [0, 2, 1]


def test_looking_at_all_rows_each_turn_is_plain_greedy():
    x = unit(np.random.default_rng(0).normal(size=(40, 6)))
    everything = np.tile(np.arange(8), (40, 1))
    found = stochastic_greedy(x, x, 8, everything)
    exact = lazy_greedy(np.maximum(x @ x.T, 0), 8)
    assert found.rows.tolist() == exact.rows.tolist()
    np.testing.assert_allclose(found.gains, exact.gains, atol=1e-6)


def test_random_turns_lose_little_and_fill_the_budget():
    g = np.random.default_rng(1)
    x = unit(g.normal(size=(12, 8))[g.integers(0, 12, 600)] * 3 + g.normal(size=(600, 8)))
    s = np.maximum(x @ x.T, 0)
    best = value_of(s, lazy_greedy(s, 30).rows)
    found = stochastic_greedy(x, x, 30, g.integers(0, 30, (600, 5)))
    random = value_of(s, g.choice(600, 30, replace=False))
    assert value_of(s, found.rows) > 0.97 * best > 0.97 * random
    # Every row looked at in the first turn only: the others take the first rows that are left.
    starved = stochastic_greedy(x, x, 9, np.zeros((600, 1), dtype=int))
    assert len(set(starved.rows.tolist())) == 9
