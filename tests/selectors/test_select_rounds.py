"""Rounds of a budget over clusters: exact sizes, weights that stay weights, planted clusters."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.rows.schema import digest
from siftline.selectors.rounds import Rounds


def members(counts, **columns):
    cluster = np.repeat(np.arange(len(counts)), counts)
    ids = [digest("round", i) for i in range(len(cluster))]
    return pl.DataFrame({"id": ids, "cluster": cluster, **columns})


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=8),
    st.floats(0.05, 1.0),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_rounds_take_the_size_exactly_and_no_row_twice(counts, share, rounds, seed):
    pool = members(counts)
    size = max(rounds, int(share * pool.height))
    if size > pool.height:
        return
    plan = Rounds(size, rounds, seed=seed)
    assert sum(plan.sizes()) == size
    weights, taken = plan.first_weights(len(counts)), []
    g = np.random.default_rng(seed)
    for number in range(rounds):
        drawn = plan.draw(pool, weights, number, taken).to_list()
        assert not set(drawn) & set(taken)
        taken += drawn
        scored = pool.filter(pl.col("id").is_in(drawn)).with_columns(
            difference=pl.Series(g.normal(size=len(drawn)) - 3)  # negative, as is usual
        )
        weights = plan.updated(weights, scored)
        assert weights.sum() == pytest.approx(1)
        assert weights.min() >= plan.floor / len(counts) * (1 - 1e-9)
    assert len(taken) == size


def test_the_update_by_hand():
    plan = Rounds(10, floor=0.0)
    scored = pl.DataFrame({"cluster": [0, 0, 1, 3], "difference": [1.0, 3.0, -2.0, 0.0]})
    # Means 2, -2, none, 0: the one without rows counts as their mean, 0.
    z = np.array([2, -2, 0, 0]) / np.std([2, -2, 0])
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    expected = weights * np.exp(z)
    np.testing.assert_allclose(plan.updated(weights, scored), expected / expected.sum())
    level = scored.with_columns(difference=pl.lit(-1.0))
    np.testing.assert_allclose(plan.updated(weights, level), weights)


def test_a_cluster_that_teaches_most_gains_rows_and_none_vanishes():
    pool = members([100] * 4)
    plan = Rounds(120, 3, floor=0.2)
    weights, taken, shares = plan.first_weights(4), [], []
    for number in range(3):
        drawn = plan.draw(pool, weights, number, taken)
        taken += drawn.to_list()
        rows = pool.filter(pl.col("id").is_in(drawn.to_list()))
        shares.append(np.bincount(rows["cluster"], minlength=4))
        weights = plan.updated(
            weights, rows.with_columns(difference=1.0 * (pl.col("cluster") == 2))
        )
    assert shares[0].tolist() == [10, 10, 10, 10]
    assert shares[0][2] < shares[1][2] < shares[2][2]
    assert min(share.min() for share in shares) >= 2


def test_a_full_cluster_hands_its_quota_on_and_order_changes_nothing():
    pool = members([2, 50])
    plan = Rounds(20, 1)
    drawn = plan.draw(pool, np.array([0.9, 0.1]), 0, [])
    assert np.bincount(pool.filter(pl.col("id").is_in(drawn.to_list()))["cluster"]).tolist() == [
        2,
        18,
    ]
    assert plan.draw(pool.reverse(), np.array([0.9, 0.1]), 0, []).equals(drawn)
    one = members([10], quality=[1.0] * 9 + [30.0])
    hits = sum(
        one["id"][9] in Rounds(1, 1, seed=s).draw(one, np.ones(1), 0, []).to_list()
        for s in range(200)
    )
    assert abs(hits / 200 - 30 / 39) < 0.1


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="rounds is 5: give 1 to 3"):
        Rounds(3, 5)
    with pytest.raises(ValueError, match="floor 1"):
        Rounds(3, 1, floor=1.0)
    with pytest.raises(ValueError, match="draws 3 rows and 2 are left"):
        Rounds(3, 1).draw(members([2]), np.ones(1), 0, [])
    with pytest.raises(ValueError, match="score at least one row"):
        Rounds(3).updated(np.ones(1), pl.DataFrame({"cluster": [], "difference": []}))
    with pytest.raises(ValueError, match="quality must be finite"):
        Rounds(1, 1).draw(members([2], quality=[1.0, -1.0]), np.ones(1), 0, [])
