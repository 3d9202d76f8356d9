"""Duplicates by meaning, a target size, and weights from cluster sizes."""

import json
import tracemalloc

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.cli import main
from siftline.deduplication.output import fitted, published
from siftline.deduplication.semantic import (
    MAX_ROWS,
    semantic_duplicates,
    semantic_reference,
    vectors_of,
)


@pytest.fixture
def call(tmp_path, capsys):
    def act(*arguments, out="out"):
        with pytest.raises(SystemExit) as ended:
            main(["dedup", *map(str, arguments), "--out", str(tmp_path / out), "--json"])
        said = capsys.readouterr()
        if ended.value.code:
            (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
            return line
        return json.loads(said.out)

    return act


def clustered(n=300, width=16, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, width))
    x = centres[rng.integers(0, 40, n)] + rng.normal(size=(n, width)) * rng.choice(
        [0.05, 0.2, 0.4], (n, 1)
    )
    return (x * rng.uniform(0.1, 9, (n, 1))).astype(np.float32)


# ---- by meaning ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([0.7, 0.9, 0.97]))
def test_meaning_equals_comparing_all_and_blocks_change_nothing(seed, block, threshold):
    x = clustered(90, 6, seed)
    x[5] = 0
    whole = semantic_duplicates(x, threshold, block=block)
    assert whole.matched.tolist() == semantic_reference(x, threshold)
    assert (whole.similarity[~whole.kept] >= threshold).all()
    assert whole.kept[5]
    dropped = semantic_duplicates(x, threshold, block=block, drop_all=True)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    near = unit.astype(np.float64) @ unit.T.astype(np.float64)
    np.fill_diagonal(near, 0)
    if (abs(near - threshold) > 1e-6).all():
        assert dropped.kept.tolist() == (near.max(axis=1) < threshold).tolist()


def test_planted_meanings_are_found_and_priority_decides():
    x = clustered()
    rng = np.random.default_rng(4)
    x = np.concatenate([x, 3 * x[:50] + rng.normal(size=(50, 16)).astype(np.float32) * 1e-3])
    result = semantic_duplicates(x, 0.99)
    assert not result.kept[-50:].any()
    last = semantic_duplicates(x, 0.99, priority=-np.arange(len(x), dtype=np.float64))
    assert not last.kept[:50].any()
    gone = np.flatnonzero(~last.kept)
    assert (last.matched[gone] > gone).all()


def test_equal_directions_are_found_at_one_however_long_the_vectors_are():
    x = np.random.default_rng(0).normal(size=(50, 384))
    same = np.concatenate([x, x, 3 * x, x * 1e-200, x * 1e200])
    result = semantic_duplicates(same, 1.0)
    assert result.matched.tolist() == [-1] * 50 + [*range(50)] * 4
    assert (result.similarity[50:] == 1.0).all()
    assert result.matched.tolist() == semantic_reference(same[:150], 1.0) + [*range(50)] * 2
    assert semantic_duplicates(np.concatenate([x, x + 0.01 * x[::-1]]), 1.0).kept.all()


def test_many_copies_cost_as_many_comparisons():
    """And no memory of pairs, of which there are 36 million here, whichever copies go."""
    x = np.ones((6000, 3), np.float32)
    for drop in (False, True):
        tracemalloc.start()
        result = semantic_duplicates(x, 0.9, drop_all=drop)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert result.pairs <= 6000
        assert result.matched.tolist() == [1 if drop else -1] + [0] * 5999
        assert peak < 40e6


@pytest.mark.parametrize("drop", [False, True])
def test_meaning_across_chunks(drop, monkeypatch):
    monkeypatch.setattr("siftline.deduplication.semantic.CHUNK", 7)
    x = clustered(150, 6, 3)
    assert not (whole := semantic_duplicates(x, 0.9, drop_all=drop, block=4)).kept.all()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    near = unit.astype(np.float64) @ unit.T.astype(np.float64) >= 0.9
    np.fill_diagonal(near, False)
    first = np.where(near.any(axis=1), near.argmax(axis=1), -1).tolist()
    assert whole.matched.tolist() == (first if drop else semantic_reference(x, 0.9))


def test_wrong_embeddings_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        semantic_duplicates(np.zeros(3))
    x = np.ones((6000, 2))
    x[5001, 1] = np.inf
    with pytest.raises(ValueError, match=r"row 5,001 .*not finite: embed it again, or leave"):
        semantic_duplicates(x, priority=-np.arange(6000.0))
    with pytest.raises(ValueError, match="give numbers"):
        semantic_duplicates(np.full((2, 2), "a"))
    with pytest.raises(ValueError, match=r"1,000,001 rows .* by source or topic"):
        semantic_duplicates(np.broadcast_to(np.float32(1), (MAX_ROWS + 1, 1)))
    with pytest.raises(ValueError, match="threshold=2"):
        semantic_duplicates(np.zeros((2, 2)), 2)
    for wrong in ([[1.0], None], [[1.0], [1.0, 2.0, 3.0]], [[1.0], [1.0, 2.0]]):
        with pytest.raises(ValueError, match="one width"):
            vectors_of(pa.chunked_array([pa.array(wrong)]))
    with pytest.raises(ValueError, match="holds no embeddings"):
        vectors_of(pa.chunked_array([["a"]]))


def test_embeddings_come_from_a_column_or_a_file(call, tmp_path):
    x = clustered(60)
    path = tmp_path / "a.parquet"
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    pq.write_table(pa.table({"text": ["same"] * 60, "v": fixed}), path, row_group_size=25)
    np.save(tmp_path / "x.npy", x)
    expected = np.flatnonzero(semantic_duplicates(x).kept)
    for k, given_as in enumerate(["v", tmp_path / "x.npy"]):
        said = call(path, "--embeddings", given_as, out=f"o{k}")
        assert said["kept"] == len(expected)
        gone = pl.read_parquet(tmp_path / f"o{k}" / "removed" / "*.parquet")
        assert set(gone["sift_reason"]) == {"semantic_duplicate"}
        assert gone["sift_similarity"].min() >= 0.95
    np.save(tmp_path / "y.npy", x[:5])
    assert "5 vectors for 60 rows" in call(path, "--embeddings", tmp_path / "y.npy", out="o3")
    assert "no readable" in call(path, "--embeddings", tmp_path / "z.npy", out="o3")
    assert "leave one out" in call(path, "--embeddings", "v", "--index", tmp_path / "i", out="o3")


def test_a_target_for_embeddings_takes_the_highest_cosine_that_reaches_it(call, tmp_path):
    x = clustered(300)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["same"] * 300}), path)
    np.save(tmp_path / "x.npy", x)
    options = ["--embeddings", tmp_path / "x.npy"]
    said = call(path, *options, "--threshold", 0.7, "--target", 150, out="o0")
    steps = [round(1 - 0.01 * k, 6) for k in range(31)]
    kept = [int(semantic_duplicates(x, step).kept.sum()) for step in steps]
    place = next(k for k, left in enumerate(kept) if left <= 150)
    assert 0 < place < 30
    assert (said["threshold"], said["kept"]) == (steps[place], kept[place])
    pairs = sum(semantic_duplicates(x, step).pairs for step in steps[: place + 1])
    assert said["pairs_verified"] == pairs
    assert call(path, *options, out="o1")["threshold"] == 0.95
    said = call(path, *options, "--target", 3, out="o2")
    assert "at threshold 0.95 still" in said
    assert "lower the threshold" in said


# ---- a target size, weights ------------------------------------------------------------------


def copies():
    """Ten documents of 100 words, each with copies that have 1, 2, 4 and 8 words changed."""
    rng = np.random.default_rng(7)
    rows = []
    for k in range(10):
        words = [f"d{k}w{w}" for w in range(100)]
        rows.append(" ".join(words))
        for changes in (1, 2, 4, 8):
            for at in rng.choice(20, changes, replace=False) * 5:
                words[at] = f"x{rng.integers(10**9)}"
            rows.append(" ".join(words))
    return rows


def test_a_target_takes_the_highest_threshold_that_reaches_it(call, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": copies()}), path)
    said = call(path, "--target", "25", "--threshold", "0.5", out="o0")
    assert said["kept"] <= 25
    assert 0.5 < said["threshold"] < 1.0
    above = round(said["threshold"] + 0.01, 6)
    # The same bands, so that only the threshold differs.
    higher = call(path, "--target", str(said["kept"] + 1), "--threshold", "0.5", out="o1")
    assert higher["threshold"] >= said["threshold"]
    assert call(path, "--threshold", above, out="o2")["kept"] > 25
    # Bands of its own, which promise 99 % of the pairs: one may be missed.
    assert 0 <= call(path, "--threshold", said["threshold"], out="o3")["kept"] - said["kept"] <= 1
    assert "lower the threshold" in call(path, "--target", "3", out="o4")
    assert "target=0" in call(path, "--target", "0", out="o4")


def test_weights_follow_the_published_rule(call, tmp_path):
    sizes = np.array([1, 2, 3, 4, 5, 99, 100, 999, 1000, 10**6])
    assert published(sizes).tolist() == [1, 2, 3, 3, 5, 5, 8, 8, 1, 1]
    texts = ["a b c d e f"] * 4 + ["g h i j k l"] * 2 + ["alone it stands here"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    call(tmp_path / "a.parquet", "--rehydrate")
    kept = pl.read_parquet(tmp_path / "out" / "data" / "*.parquet")
    assert kept.columns == ["text", "sift_cluster_size", "sift_weight"]
    assert kept["sift_cluster_size"].to_list() == [4, 2, 1]
    assert kept["sift_weight"].to_list() == [3, 2, 1]
    call(tmp_path / "a.parquet", "--rehydrate", "--index", tmp_path / "i", out="o2")
    assert pl.read_parquet(tmp_path / "o2" / "data" / "*.parquet").equals(kept)


def test_weights_fitted_to_rates_by_hand():
    # Overall 0.5, lowest 0.1, at most 9 repeats: 1 + 8 (0.5 - rate) / 0.4 before smoothing.
    rates = [0.6, 0.4, 0.3, 0.2, 0.1, 0.2, 0.5, 0.9]
    raw = [1, 3, 5, 7, 9, 7, 1, 1]
    smooth = [1, 3, (1 + 3 + 5 + 7 + 9) / 5, 31 / 5, 29 / 5, 25 / 5, 1, 1]
    assert fitted(rates, 0.5, 9).tolist() == [round(value) for value in smooth]
    assert fitted(rates[:4], 0.5, 9).tolist() == [1, 4, 6, 9]  # too few to smooth
    assert fitted(rates[2:5], 0.5, 9).tolist() == raw[2:5]
    assert fitted([0.7, 0.8], 0.5, 9).tolist() == [1, 1]
    assert fitted([], 0.5, 9).tolist() == []
    for wrong in (([1.2], 0.5, 3), ([0.5], -1, 3), ([0.5], 0.5, 0)):
        with pytest.raises(ValueError, match=r"in \[0, 1\]|at least 1"):
            fitted(*wrong)
