"""Lists of the best rows in blocks against all pairs, and the round-robin over them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.kernels.vectors import topk
from siftline.kernels.vectors.blocks import (
    COSINE,
    block_rows,
    cosine_blocks,
    on_grid,
    over_blocks,
    unit,
)
from siftline.kernels.vectors.topk import round_robin, round_robin_reference, top_lists


def lists_of(scores, r, block=7):
    """Lists over a matrix of all scores, shape (q, n)."""
    return top_lists(scores.shape[1], len(scores), r, block, lambda a, b: scores[:, a:b].T)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 50),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_lists_are_those_of_a_full_sort(q, n, r, block, seed):
    # Few distinct values, so that ties are everywhere, with both signs and both zeros.
    scores = np.random.default_rng(seed).choice([-1.5, -0.0, 0.0, 0.25, 2], (q, n))
    found = lists_of(scores.astype(np.float32), r, block)
    for i in range(q):
        order = sorted(range(n), key=lambda j: (-scores[i, j], j))[:r]
        assert found.rows[i].tolist() == order
        np.testing.assert_array_equal(found.scores[i], scores[i, order].astype(np.float32))
    assert found.whole == (r >= n)


def test_pending_rows_are_merged_on_the_way():
    scores = np.random.default_rng(0).normal(size=(2, 40_000)).astype(np.float32)
    found = lists_of(scores, 5, block=1000)
    assert found.rows.tolist() == np.argsort(-scores, axis=1)[:, :5].tolist()


def test_what_waits_is_limited_for_all_queries_together(monkeypatch):
    seen = []
    best = topk._best

    def watched(keys, r):
        seen.append(keys.size)
        return best(keys, r)

    monkeypatch.setattr(topk, "PENDING", 4096)
    monkeypatch.setattr(topk, "_best", watched)
    scores = np.random.default_rng(0).normal(size=(50, 8000)).astype(np.float32)
    found = lists_of(scores, 3, block=40)
    assert found.rows.tolist() == np.argsort(-scores, axis=1)[:, :3].tolist()
    assert max(seen) <= 2 * 3 * 50 + 4096 + 3 * 50  # 30,000 keys of 200 blocks were found


def test_the_known_round_robin():
    scores = np.array([[0.9, 0.8, 0.1, 0.0, 0.3], [0.95, 0.2, 0.7, 0.6, 0.1]], np.float32)
    assert round_robin(lists_of(scores, 5), 4).rows.tolist() == [0, 2, 1, 3]
    assert round_robin_reference(scores, 4) == [0, 2, 1, 3]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**31))
def test_round_robin_over_lists_is_that_over_all_pairs(q, n, k, seed):
    scores = np.random.default_rng(seed).choice(np.linspace(0, 1, 9), (q, n)).astype(np.float32)
    picks = round_robin(lists_of(scores, n), k)
    assert picks.rows.tolist() == round_robin_reference(scores, k)
    assert not picks.starved
    counts = np.bincount(picks.queries, minlength=q)
    assert counts.max() - counts.min() <= 1
    assert len(set(picks.rows.tolist())) == len(picks.rows) == min(k, n)


def test_short_lists_are_told_and_their_picks_are_the_beginning():
    scores = np.tile(np.linspace(1, 0, 20, dtype=np.float32), (4, 1))  # all want the same rows
    short = round_robin(lists_of(scores, 6), 12)
    assert short.starved
    assert short.rows.tolist() == round_robin_reference(scores, 12)[: len(short.rows)]
    assert len(short.rows) == 6


def test_blocks_come_in_order_and_any_error_is_raised():
    spans = list(over_blocks(10, 3, lambda a, b: b - a))
    assert spans == [(0, 3, 3), (3, 6, 3), (6, 9, 3), (9, 10, 1)]
    with pytest.raises(ZeroDivisionError):
        list(over_blocks(5, 2, lambda a, b: 1 // (a - 2)))


def test_a_cosine_depends_on_its_two_vectors_alone():
    g = np.random.default_rng(0)
    x = g.normal(size=(300, 48)).astype(np.float16)
    y = g.normal(size=(37, 48)).astype(np.float32)
    x[[6, 250, 251]] = x[3]
    similarities, _ = cosine_blocks(x, y)
    whole = similarities(0, 300)
    wide = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None]
    np.testing.assert_allclose(whole, wide @ unit(y).T, atol=1e-6)
    assert len({whole[i].tobytes() for i in (3, 6, 250, 251)}) == 1
    order = g.permutation(300)
    moved, _ = cosine_blocks(x[order], y[::-1])
    assert moved(100, 171).tobytes() == np.ascontiguousarray(whole[order][100:171, ::-1]).tobytes()
    assert (cosine_blocks(np.zeros((2, 48)), y)[0](0, 2) == 0).all()


def test_sums_on_the_grid_are_exact():
    # Long vectors of equal numbers reach the largest sums; whole numbers in Python are the truth.
    x = np.concatenate([np.ones((1, 4096)), np.random.default_rng(1).normal(size=(3, 4096))])
    grid = on_grid(x)
    exact = [[sum(int(a) * int(b) for a, b in zip(i, j, strict=True)) for j in grid] for i in grid]
    assert (grid @ grid.T).tolist() == exact
    assert max(max(line) for line in exact) < 2**52
    np.testing.assert_allclose(np.diag(exact) * COSINE, 1, atol=1e-5)


def test_blocks_have_bounds():
    assert (block_rows(1), block_rows(10_000), block_rows(10**9)) == (4096, 209, 64)
