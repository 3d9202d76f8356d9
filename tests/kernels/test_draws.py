"""Draws: uniform, independent of everything but their name, and weighted as Gumbel top-k says."""

import hashlib
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftline.kernels import draws
from siftline.kernels.draws import (
    gumbel_top_k,
    hash64,
    hash64_each,
    quick_uniform_reference,
    quick_uniforms,
    uniforms,
)

IDS = [f"{i:040x}" for i in range(4000)]


def one(seed, stage, identity, index):
    """The same draw in integers and fractions, written apart from the kernel."""
    payload = "\x1f".join([str(seed), stage, str(index), identity]).encode()
    raw = int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "little")
    return (raw // 2**12 + 0.5) / 2**52


@given(st.integers(0, 2**31), st.text(max_size=8), st.lists(st.text(max_size=8)), st.integers(0, 9))
def test_each_draw_is_a_hash_of_its_own_name(seed, stage, ids, index):
    got = uniforms(seed, stage, ids, index)
    assert got.tolist() == [one(seed, stage, i, index) for i in ids]
    assert got.dtype == np.float64
    shuffled = random.Random(0).sample(ids, len(ids))
    again = dict(zip(shuffled, uniforms(seed, stage, shuffled, index), strict=True))
    assert [again[i] for i in ids] == got.tolist()


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_the_ends_of_the_interval_are_never_drawn(monkeypatch, byte):
    """The largest hash must not round to 1, where log(-log(u)) is infinite."""

    class Extreme:
        @staticmethod
        def blake2b(payload, digest_size):
            return type("Digest", (), {"digest": lambda self: byte * digest_size})()

    monkeypatch.setattr(draws, "hashlib", Extreme)
    (u,) = uniforms(0, "s", ["a"])
    assert 0 < u < 1
    assert math.isfinite(-math.log(-math.log(u)))


def test_draws_are_uniform_and_streams_uncorrelated():
    u = uniforms(0, "diversity", IDS)
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    chi2 = float(((counts - 200) ** 2 / 200).sum())
    assert chi2 < 43.8  # 0.999 quantile at 19 degrees of freedom
    others = [
        uniforms(1, "diversity", IDS),
        uniforms(0, "allocate", IDS),
        uniforms(0, "diversity", IDS, 1),
    ]
    for other in others:
        assert abs(np.corrcoef(u, other)[0, 1]) < 4 / math.sqrt(len(IDS))


def test_seed_stage_and_index_do_not_run_into_each_other():
    assert uniforms(1, "1", ["x"], 1)[0] != uniforms(11, "", ["x"], 1)[0]
    assert hash64(1, 23) != hash64(12, 3)
    assert hash64("a", 1) == hash64("a", "1")


@given(st.lists(st.integers() | st.text(max_size=5), max_size=4))
def test_hash64_fits_63_bits(parts):
    assert 0 <= hash64(*parts) < 2**63
    assert hash64(*parts) == hash64(*parts)


def test_hash64_never_changes():
    """Golden: the samples in every store were drawn with these seeds."""
    assert hash64(0, "0123456789abcdef0123", 4) == 1968028374848802057


@given(st.data())
def test_top_k_against_a_plain_sort_and_any_order(data):
    n = data.draw(st.integers(1, 12))
    ids = [f"id{i}" for i in range(n)]
    u = data.draw(st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.9]), min_size=n, max_size=n))
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=n, max_size=n))
    k = data.draw(st.integers(0, n))

    def key(i):
        log_w = math.log(weights[i]) if weights[i] else -math.inf
        return (-(log_w - math.log(-math.log(u[i]))), ids[i])

    want = [ids[i] for i in sorted(range(n), key=key)[:k]]
    order = data.draw(st.permutations(range(n)))
    got = gumbel_top_k(
        np.array([u[i] for i in order]),
        [ids[i] for i in order],
        k,
        np.array([weights[i] for i in order]),
    )
    assert [ids[order[p]] for p in got] == want


def test_picks_follow_the_weights_without_replacement():
    """P(first = i) = w_i / sum, and P(second = j | first = i) = w_j / (sum - w_i)."""
    weights, ids, n = np.array([1.0, 2.0, 5.0]), ["a", "b", "c"], 20_000
    pairs: dict[tuple[int, int], int] = {}
    table = np.stack([uniforms(seed, "t", ids) for seed in range(n)])
    for u in table:
        first, second = gumbel_top_k(u, ids, 2, weights).tolist()
        pairs[first, second] = pairs.get((first, second), 0) + 1
    for i, j in itertools.permutations(range(3), 2):
        p = weights[i] / weights.sum() * weights[j] / (weights.sum() - weights[i])
        assert abs(pairs[i, j] / n - p) < 4 * math.sqrt(p * (1 - p) / n), (i, j)


def test_equal_weights_are_no_weights_and_weight_0_comes_last():
    ids, u = IDS[:50], uniforms(3, "t", IDS[:50])
    plain = gumbel_top_k(u, ids, 20)
    assert plain.tolist() == gumbel_top_k(u, ids, 20, np.full(50, 4.0)).tolist()
    assert plain.tolist() == np.argsort(-u)[:20].tolist()
    weights = np.ones(50)
    weights[:10] = 0
    assert set(gumbel_top_k(u, ids, 40, weights)) == set(range(10, 50))
    assert set(gumbel_top_k(u, ids, 50, weights)[40:]) == set(range(10))


def test_one_percent_more_rows_changes_about_one_percent():
    k = 1000
    before = set(gumbel_top_k(uniforms(0, "t", IDS), IDS, k).tolist())
    more = [*IDS, *(f"{i:040x}" for i in range(4000, 4040))]
    after = set(gumbel_top_k(uniforms(0, "t", more), more, k).tolist())
    lost = len(before - after)
    assert lost == len(after & set(range(4000, 4040)))  # only newcomers displace
    assert 0 < lost <= 25  # 10 expected


@pytest.mark.parametrize(
    ("k", "weights", "says"),
    [
        (4, None, "cannot draw 4 of 3"),
        (1, [1.0, -1.0, 1.0], "not negative"),
        (1, [1.0, math.nan, 1.0], "finite"),
        (1, [1.0, math.inf, 1.0], "finite"),
    ],
)
def test_impossible_draws_are_refused(k, weights, says):
    given_weights = None if weights is None else np.array(weights)
    with pytest.raises(ValueError, match=says):
        gumbel_top_k(np.array([0.1, 0.2, 0.3]), ["a", "b", "c"], k, given_weights)


@given(
    st.integers(0, 2**63), st.text(max_size=9), st.lists(st.text("0123456789abcdef-", max_size=41))
)
def test_quick_draws_are_those_of_the_reference_whoever_else_is_asked(seed, stage, ids):
    drawn = quick_uniforms(seed, stage, ids)
    assert drawn.tolist() == [quick_uniform_reference(seed, stage, i) for i in ids]
    assert ((drawn > 0) & (drawn < 1)).all()


def test_quick_draws_are_uniform_and_streams_uncorrelated():
    ids = [hashlib.sha256(str(i).encode()).hexdigest()[:40] for i in range(20_000)]
    streams = [quick_uniforms(seed, stage, ids) for seed in (0, 1) for stage in ("a", "b")]
    for u in streams:
        assert abs(np.sort(u) - (np.arange(len(u)) + 0.5) / len(u)).max() < 2.0 / len(u) ** 0.5
    assert abs(np.corrcoef(streams) - np.eye(4)).max() < 0.03


@given(st.lists(st.text()))
def test_hashes_of_many_texts_are_those_of_each(texts):
    assert hash64_each(texts).tolist() == [hash64(text) for text in texts]
