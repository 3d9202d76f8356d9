"""Duplicates by meaning in cells: what faiss finds, beside the exact search."""

import json
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.cli import main
from siftline.deduplication import semantic as cells
from siftline.deduplication.run import Job
from siftline.deduplication.semantic import MAX_ROWS_FAISS, Cells, semantic_duplicates


def planted(rows, width, cosine, seed=0, topics=50):
    """Rows around topics, a third of them copies turned to a cosine; and the pairs."""
    rng = np.random.default_rng(seed)
    n = rows * 2 // 3
    x = rng.normal(size=(topics, width))[rng.integers(0, topics, n)] + rng.normal(size=(n, width))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    source = rng.integers(0, n, rows - n)
    noise = rng.normal(size=(rows - n, width))
    noise -= (noise * x[source]).sum(axis=1, keepdims=True) * x[source]
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    copies = cosine * x[source] + np.sqrt(1 - cosine**2) * noise
    place = rng.permutation(rows)
    out = np.empty((rows, width), np.float32)
    out[place] = np.concatenate([x, copies])
    return out, np.stack([place[source], place[n:]], axis=1)


def cosine(x, left, right):
    a, b = x[left].astype(np.float64), x[right].astype(np.float64)
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture
def few(monkeypatch):
    """Small spans and two cells a row, so that a few hundred rows meet every part."""
    monkeypatch.setattr(cells, "SPANS", (16, 64))
    monkeypatch.setattr(cells, "LISTS", 5)
    monkeypatch.setattr(cells, "ROWS_A_CELL", 4)
    monkeypatch.setattr(cells, "probes", lambda threshold: 2)
    monkeypatch.setattr(cells, "CHUNK", 7)


@pytest.mark.parametrize("threshold", [0.95, 0.9, 0.8, 0.7])
def test_planted_copies_are_found_and_as_many_as_by_the_exact_search(threshold):
    x, pairs = planted(6000, 64, threshold + 0.02)
    exact = semantic_duplicates(x, threshold)
    found = semantic_duplicates(x, threshold, nearest="faiss")
    gone = ~found.kept
    assert gone[~exact.kept].mean() >= 0.99
    assert gone[pairs].any(axis=1).mean() >= 0.99
    assert abs(int(gone.sum()) - int((~exact.kept).sum())) <= 0.01 * gone.sum()
    assert (found.matched == exact.matched).mean() > 0.98


def test_a_pair_in_cells_far_apart_is_missed_and_only_there(few, monkeypatch):
    """One cell a row is too few: so recall above is measured on something that can fail."""
    monkeypatch.setattr(cells, "probes", lambda threshold: 1)
    x, pairs = planted(3000, 64, 0.72, topics=3000)
    found = semantic_duplicates(x, 0.7, nearest="faiss")
    assert 0.1 < (~found.kept)[pairs].any(axis=1).mean() < 0.85


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10**6), st.integers(2, 300), st.sampled_from([0.7, 0.9, 1.0]), st.booleans())
def test_what_goes_resembles_what_stays(seed, rows, threshold, drop_all):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "SPANS", (16, 64))
        patch.setattr(cells, "ROWS_A_CELL", 4)
        patch.setattr(cells, "probes", lambda threshold: 2)
        x, _ = planted(rows, 6, 0.95, seed, topics=5)
        x[rows // 2] = 0
        x = np.concatenate([x, 2 * x[: rows // 3]])
        priority = np.random.default_rng(seed).integers(0, 9, len(x)).astype(np.float64)
        found = semantic_duplicates(
            x, threshold, priority=priority, drop_all=drop_all, nearest="faiss"
        )
        gone = np.flatnonzero(~found.kept)
        to = found.matched[gone]
        assert found.kept[rows // 2]
        assert np.allclose(found.similarity[gone], cosine(x, gone, to), atol=2e-6)
        assert (found.similarity[gone] >= threshold).all()
        if not drop_all:
            assert found.kept[to].all()
            sooner = np.lexsort((np.arange(len(x)), priority)).argsort()
            assert (sooner[to] < sooner[gone]).all()
            # Rows that come in another order but keep their place in keep order: the same ones.
            order = np.random.default_rng(seed + 1).permutation(len(x))
            again = semantic_duplicates(
                x[order], threshold, priority=sooner[order].astype(float), nearest="faiss"
            )
            assert (again.kept == found.kept[order]).all()


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from([0.7, 0.9]), st.booleans())
def test_searching_every_cell_is_the_exact_search(seed, threshold, drop_all):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "SPANS", (16, 64))
        patch.setattr(cells, "CHUNK", 7)
        patch.setattr(cells, "ROWS_A_CELL", 4)
        patch.setattr(cells, "probes", lambda threshold: 10**6)
        x, _ = planted(400, 6, 0.93, seed, topics=9)
        exact = semantic_duplicates(x, threshold, drop_all=drop_all)
        found = semantic_duplicates(x, threshold, drop_all=drop_all, nearest="faiss")
        assert (found.kept == exact.kept).all()
        if not drop_all:
            assert (found.matched == exact.matched).all()
            assert (found.similarity == exact.similarity).all()


def test_every_copy_goes_where_none_is_to_stay():
    """Of a chain A~B~C, where A and C differ, all three: C resembles a row that itself goes."""
    x, pairs = planted(6000, 32, 0.97)
    exact = semantic_duplicates(x, 0.95, drop_all=True)
    found = semantic_duplicates(x, 0.95, drop_all=True, nearest="faiss")
    assert (~found.kept)[pairs].mean() >= 0.99
    assert not (exact.kept & ~found.kept).any()
    assert (~found.kept)[~exact.kept].mean() >= 0.99
    turn = np.deg2rad([0, 15, 30, 90])
    chain = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    result = semantic_duplicates(chain, 0.96, drop_all=True, nearest="faiss")
    assert result.kept.tolist() == [False, False, False, True]


def test_versions_of_one_template_leave_one_row():
    """A clump must not be cut into cells that hide its rows from each other."""
    rng = np.random.default_rng(1)
    other = rng.normal(size=(4000, 32))
    clump = rng.normal(size=32) + 1e-3 * rng.normal(size=(12000, 32))
    x = np.concatenate([clump, other])[rng.permutation(16000)]
    found = semantic_duplicates(x, 0.95, nearest="faiss")
    assert found.kept.tolist() == semantic_duplicates(x, 0.95).kept.tolist()
    assert int(found.kept.sum()) == 4001
    assert found.pairs < 40_000


def test_equal_rows_cost_a_comparison_each():
    x = np.ones((30_000, 3), np.float32)
    for drop in (False, True):
        found = semantic_duplicates(x, 1.0, nearest="faiss", drop_all=drop)
        assert found.matched.tolist() == [1 if drop else -1] + [0] * 29_999
        assert found.pairs < 40_000


def test_no_rows_no_directions_and_one():
    for x in (np.zeros((0, 4)), np.zeros((40, 4)), np.ones((1, 4))):
        assert semantic_duplicates(x, 0.5, nearest="faiss").kept.all()


THREADS = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
from test_dedup_cells import planted
from siftline.deduplication.semantic import semantic_duplicates
x, _ = planted(2500, 48, 0.72, topics=2500)
found = semantic_duplicates(x, 0.7, nearest="faiss")
np.save(sys.argv[2], np.stack([found.matched, found.similarity, np.full(2500, found.pairs)]))
"""


def test_threads_change_nothing(tmp_path):
    """Rows without topics at a low threshold, where many pairs are missed, so that any shift of
    cells would show."""
    here = os.path.dirname(__file__)
    said = []
    for count in ("1", "3"):
        path = tmp_path / f"{count}.npy"
        limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        threads = {**os.environ, **dict.fromkeys(limits, count)}
        code = THREADS.replace(
            "import sys,", f"import os; os.cpu_count = lambda: {count}\nimport sys,"
        )
        subprocess.run([sys.executable, "-c", code, here, str(path)], env=threads, check=True)
        said.append(path.read_bytes())
    assert said[0] == said[1]


def test_rows_that_are_not_finite_and_too_many_are_refused():
    x = np.ones((6000, 2))
    x[5001, 1] = np.inf
    with pytest.raises(ValueError, match=r"row 5,001 .*not finite"):
        semantic_duplicates(x, nearest="faiss", priority=-np.arange(6000.0))
    many = np.broadcast_to(np.float32(1), (MAX_ROWS_FAISS + 1, 1))
    with pytest.raises(ValueError, match=r"10,000,001 rows .* by source or topic"):
        semantic_duplicates(many, nearest="faiss")
    with pytest.raises(ValueError, match="search with faiss"):
        semantic_duplicates(many[:1_000_001])
    with pytest.raises(ValueError, match="nearest='annoy'"):
        semantic_duplicates(x, nearest="annoy")


def test_probes_grow_where_rows_may_be_less_similar():
    found = [cells.probes(threshold) for threshold in (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)]
    assert found[:3] == [16, 16, 16]
    assert found == sorted(found)


def test_the_file_is_read_span_by_span(tmp_path):
    """And kept rows are all that stays of it."""
    asked = []

    class Watched(np.ndarray):
        def __getitem__(self, key):
            if isinstance(key, np.ndarray):
                asked.append(len(key))
            return np.asarray(super().__getitem__(key))

    x, _ = planted(8000, 16, 0.97)
    found = Cells(x.view(Watched), np.arange(len(x)), 0.95)
    drawn = sum(asked)
    assert drawn == int(cells.SAMPLE * np.sqrt(len(x)))
    kept = len(x) - sum(1 for _ in found.all())
    assert max(asked) <= 4096 < len(x)
    assert sum(asked) == drawn + len(x)
    assert found.index.ntotal == kept


# ---- the command -----------------------------------------------------------------------------


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["dedup", *map(str, arguments), "--json"])
    said = capsys.readouterr()
    if ended.value.code:
        (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
        return line
    return json.loads(said.out)


def test_the_command_takes_either_search_and_a_target(tmp_path, capsys):
    x, _ = planted(600, 16, 0.97)
    path, vectors = tmp_path / "a.parquet", tmp_path / "x.npy"
    pq.write_table(pa.table({"text": ["same"] * 600}), path)
    np.save(vectors, x)
    options = [path, "--embeddings", vectors, "--nearest", "faiss"]
    said = call(capsys, *options, "--out", tmp_path / "o0")
    expected = np.flatnonzero(semantic_duplicates(x, nearest="faiss").kept)
    assert said["kept"] == len(expected) < 500
    gone = pl.read_parquet(tmp_path / "o0" / "removed" / "*.parquet")
    assert set(gone["sift_reason"]) == {"semantic_duplicate"}
    assert gone["sift_similarity"].min() >= 0.95
    steps = [round(1 - 0.01 * k, 6) for k in range(6)]
    kept = [int(semantic_duplicates(x, step, nearest="faiss").kept.sum()) for step in steps]
    said = call(capsys, *options, "--target", kept[3], "--out", tmp_path / "o1")
    place = kept.index(kept[3])
    assert 0 < place < 5
    assert (said["threshold"], said["kept"]) == (steps[place], kept[place])
    said = call(capsys, path, "--nearest", "faiss", "--out", tmp_path / "o2")
    assert "give them or leave it out" in said
    with pytest.raises(ValueError, match="searches embeddings"):
        Job((str(path),), tmp_path / "o3", nearest="faiss")
