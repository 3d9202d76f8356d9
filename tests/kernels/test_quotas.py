"""Largest-remainder quotas against exact rational arithmetic, and their guarantees."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.kernels.draws import largest_remainder


def exact(weights, total, capacity):
    """The rule in plain Python with fractions: one loop, no arrays."""
    quotas = [0] * len(weights)
    left = min(total, sum(capacity))
    for positive in (True, False):
        active = [i for i, w in enumerate(weights) if (w > 0) == positive and capacity[i] > 0]
        here = min(left, sum(capacity[i] for i in active))
        left -= here
        while here:
            mass = sum(weights[i] if positive else 1 for i in active)
            share = {i: Fraction(here * (weights[i] if positive else 1), mass) for i in active}
            full = [i for i in active if share[i] >= capacity[i]]
            if full:
                for i in full:
                    quotas[i] = capacity[i]
                    here -= capacity[i]
                active = [i for i in active if i not in full]
                continue
            for i in active:
                quotas[i] = int(share[i])
            short = here - sum(quotas[i] for i in active)
            for i in sorted(active, key=lambda i: (quotas[i] - share[i], i))[:short]:
                quotas[i] += 1
            here = 0
    return quotas


def test_known_splits():
    assert largest_remainder(np.array([5, 3, 2]), 10).tolist() == [5, 3, 2]
    assert largest_remainder(np.array([1, 1, 1]), 10).tolist() == [4, 3, 3]
    # Hamilton's textbook case: 41, 41, 18 percent of 10 seats.
    assert largest_remainder(np.array([41, 41, 18]), 10).tolist() == [4, 4, 2]


def test_shortfall_goes_to_the_others_by_the_same_rule():
    quotas = largest_remainder(np.array([50, 30, 20]), 100, np.array([10, 500, 500]))
    assert quotas.tolist() == [10, 54, 36]
    assert largest_remainder(np.array([1, 1]), 100, np.array([3, 4])).tolist() == [3, 4]


def test_weight_zero_is_served_last():
    assert largest_remainder(np.array([1, 0, 0]), 5, np.array([3, 9, 9])).tolist() == [3, 1, 1]
    assert largest_remainder(np.array([1, 0]), 5).tolist() == [5, 0]
    assert largest_remainder(np.zeros(3), 4).tolist() == [2, 1, 1]


def test_equal_remainders_tie_whatever_float_noise_says():
    # 13 * 23 / 46 = 6.5 and 17 * 23 / 46 = 8.5: without rounding the later one wins.
    assert largest_remainder(np.array([13, 16, 17]), 23).tolist() == [7, 8, 8]


def test_empty_and_zero():
    assert largest_remainder(np.array([]), 7).tolist() == []
    assert largest_remainder(np.array([2.0]), 0).tolist() == [0]


@pytest.mark.parametrize(
    ("weights", "total", "capacity"),
    [
        ([-1.0], 1, None),
        ([np.nan], 1, None),
        ([1.0], -1, None),
        ([1.0], 1, [-1]),
        ([1.0], 1, [1, 2]),
    ],
)
def test_bad_input_is_refused(weights, total, capacity):
    with pytest.raises(ValueError, match=r"weights|total|capacit"):
        largest_remainder(
            np.array(weights), total, None if capacity is None else np.array(capacity)
        )


cases = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 50), min_size=n, max_size=n),
        st.integers(0, 400),
        st.lists(st.integers(0, 60), min_size=n, max_size=n),
    )
)


@settings(max_examples=400, deadline=None)
@given(cases)
def test_equals_exact_arithmetic(case):
    weights, total, capacity = case
    quotas = largest_remainder(np.array(weights), total, np.array(capacity))
    assert quotas.tolist() == exact(weights, total, capacity)
    assert quotas.sum() == min(total, sum(capacity))
    assert (quotas <= capacity).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=20), st.integers(0, 10**12))
def test_any_weights_sum_exactly_and_stay_within_one_of_the_share(weights, total):
    quotas = largest_remainder(np.array(weights), total)
    assert quotas.sum() == total
    mass = sum(Fraction(w) for w in weights)
    for quota, weight in zip(quotas.tolist(), weights, strict=True):
        assert abs(quota - Fraction(weight) * total / mass) < 1 + Fraction(1, 1000)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=10, unique=True),
    st.integers(0, 300),
    st.randoms(),
)
def test_order_of_distinct_weights_changes_nothing(weights, total, random):
    shuffled = weights[:]
    random.shuffle(shuffled)
    first = dict(zip(weights, largest_remainder(np.array(weights), total), strict=True))
    second = dict(zip(shuffled, largest_remainder(np.array(shuffled), total), strict=True))
    # Equal remainders go by index, so two entries may swap one unit; nothing else may move.
    assert all(abs(int(first[w]) - int(second[w])) <= 1 for w in weights)
