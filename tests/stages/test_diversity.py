"""k-means and the diversity shortlist: order, stability, quotas, planted clusters."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from siftline.kernels.vectors import kmeans as module
from siftline.kernels.vectors.kmeans import default_clusters, kmeans, lloyd, project_2d, silhouette
from siftline.rows.schema import digest
from siftline.rows.selection import select
from siftline.stages.diversity.decide import Diversity, draw, expand, shortlist_size


def blobs(n, k, d=16, spread=10.0, seed=0):
    g = np.random.default_rng(seed)
    truth = g.integers(0, k, n)
    x = g.normal(size=(k, d))[truth] * spread + g.normal(size=(n, d))
    return x.astype(np.float32), truth, [digest("p", i)[:20] for i in range(n)]


def frame(x, ids, dtype=pl.Float16, **columns):
    embedding = pl.Series("embedding", x, dtype=pl.Array(pl.Float32, x.shape[1]))
    named = {"prompt_id": pl.Series(ids, dtype=pl.String), **columns}
    return pl.DataFrame(named).with_columns(embedding.cast(pl.Array(dtype, x.shape[1])))


def test_kmeans_finds_blobs_numbered_by_smallest_id():
    x, truth, ids = blobs(1500, 12)
    found = kmeans(x, 12, seed=3, ids=ids)
    assert adjusted_rand_score(truth, found.labels) == 1.0
    smallest = [min(np.asarray(ids)[found.labels == j]) for j in range(12)]
    assert smallest == sorted(smallest)


def test_kmeans_agrees_with_plain_lloyd_from_its_own_end():
    x, _, ids = blobs(400, 5, spread=1.0)
    found = kmeans(x, 7, seed=1, ids=ids)
    again = lloyd(x, found.centroids, 1)
    # Converged: one more plain update moves nothing, and labels and distances are the plain ones.
    assert (again.labels == found.labels).mean() > 0.995
    np.testing.assert_allclose(again.centroids, found.centroids, atol=0.05)
    plain = lloyd(x, found.centroids, 0)
    assert (plain.labels == found.labels).all()
    np.testing.assert_allclose(plain.distances, found.distances, rtol=1e-3, atol=1e-3)


def test_kmeans_finds_the_best_of_plain_restarts_for_most_seeds():
    x, _, ids = blobs(300, 6, spread=2.0)
    g = np.random.default_rng(0)
    starts = [x[g.choice(len(x), 6, replace=False)] for _ in range(20)]
    best = min(float(lloyd(x, start, 30).distances.sum()) for start in starts)
    found = [float(kmeans(x, 6, seed, ids).distances.sum()) for seed in range(9)]
    assert np.median(found) <= best * 1.001
    assert min(found) >= best * 0.999


def test_several_starts_run_until_they_settle_beat_one_short_run(monkeypatch):
    """Beside scikit-learn's single starts, and our own."""
    x, _, ids = blobs(900, 25, d=8, spread=2.5)
    ours, single = [], []
    for seed in range(6):
        found = kmeans(x, 25, seed, ids)
        assert found.settled
        assert len(found.starts) == module.STARTS == 5
        assert found.facts()["inertia"] <= min(found.starts) * (1 + 1e-6)
        ours.append(found.facts()["inertia"])
        with monkeypatch.context() as patch:
            patch.setattr(module, "STARTS", 1)
            single.append(kmeans(x, 25, seed, ids).facts()["inertia"])
    theirs = [KMeans(25, n_init=1, random_state=seed).fit(x).inertia_ for seed in range(6)]
    assert np.mean(ours) < min(np.mean(theirs), np.mean(single))
    assert min(ours) <= KMeans(25, n_init=10, random_state=0).fit(x).inertia_ * 1.02


def test_settled_means_that_one_more_plain_update_gains_nothing():
    g = np.random.default_rng(3)  # no clusters at all: the slow case
    x, ids = g.normal(size=(1500, 6)).astype(np.float32), [digest("p", i)[:20] for i in range(1500)]
    found = kmeans(x, 30, 0, ids)
    assert found.settled
    assert found.iterations > module.TRIAL_ITERATIONS
    more = lloyd(x, found.centroids, 10).distances.sum(dtype=np.float64)
    now = found.distances.sum(dtype=np.float64)
    assert now - more <= 2 * module.SETTLED * now


def test_a_run_out_of_iterations_says_so(monkeypatch):
    g = np.random.default_rng(3)
    x, ids = g.normal(size=(1500, 6)).astype(np.float32), [digest("p", i)[:20] for i in range(1500)]
    monkeypatch.setattr(module, "MOST_ITERATIONS", 20)
    found = kmeans(x, 30, 0, ids)
    assert (found.settled, found.iterations) == (False, 20)
    assert found.facts()["settled"] is False


def test_kmeans_ignores_input_order_and_threads():
    x, _, ids = blobs(800, 9, spread=1.0)
    first = kmeans(x, 20, seed=5, ids=ids)
    order = np.random.default_rng(1).permutation(len(ids))
    with threadpool_limits(2):
        second = kmeans(x[order], 20, seed=5, ids=[ids[i] for i in order])
    assert second.labels.tobytes() == first.labels[order].tobytes()
    assert second.centroids.tobytes() == first.centroids.tobytes()
    assert second.distances.tobytes() == first.distances[order].tobytes()


def test_kmeans_barely_moves_when_rows_arrive():
    x, _, ids = blobs(4040, 30, d=32, spread=1.0)
    full = kmeans(x, 40, seed=0, ids=ids)
    part = kmeans(x[:4000], 40, seed=0, ids=ids[:4000])
    assert adjusted_rand_score(part.labels, full.labels[:4000]) > 0.85


def test_kmeans_trains_on_every_row():
    x, _, ids = blobs(3000, 1)
    # faiss's default of 256 rows per centroid would give the mean of a sample.
    np.testing.assert_allclose(kmeans(x, 1, 0, ids).centroids[0], x.mean(axis=0), atol=1e-4)


def test_kmeans_duplicates_give_fewer_clusters_and_bad_input_is_refused():
    ids = ["a", "b", "c", "d"]
    found = kmeans(np.repeat(np.eye(2, dtype=np.float32), 2, axis=0), 3, 0, ids)
    assert found.labels.max() + 1 == len(found.centroids) <= 3
    assert found.labels[0] == found.labels[1] != found.labels[2] == found.labels[3]
    with pytest.raises(ValueError, match="cannot make 5 clusters of 4 rows"):
        kmeans(np.eye(4, dtype=np.float32), 5, 0, ids)
    with pytest.raises(ValueError, match="repeated ids"):
        kmeans(np.eye(2, dtype=np.float32), 1, 0, ["a", "a"])
    with pytest.raises(ValueError, match="not finite, first id b"):
        kmeans(np.array([[1.0], [np.nan]]), 1, 0, ["a", "b"])


def test_silhouette_peaks_at_the_true_number_of_blobs():
    x, _, ids = blobs(600, 8)
    scores = {k: silhouette(x, kmeans(x, k, 0, ids).labels, 400, 0, ids) for k in (4, 8, 16)}
    assert max(scores, key=scores.get) == 8
    assert silhouette(x, np.zeros(600, dtype=int), 400, 0, ids) is None


def test_silhouette_is_that_of_its_definition():
    # Rousseeuw 1987: a is the mean distance to the own cluster, b that to the nearest other one.
    x = np.random.default_rng(2).normal(size=(9, 3)).astype(np.float32)
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3])
    far = np.sqrt(((x[:, None].astype(np.float64) - x[None]) ** 2).sum(axis=2))
    values = []
    for i, own in enumerate(labels):
        mates = [j for j in range(9) if labels[j] == own and j != i]
        if not mates:  # alone in a cluster: 0 by convention
            values.append(0.0)
            continue
        a = np.mean([far[i, j] for j in mates])
        b = min(far[i, labels == other].mean() for other in set(labels.tolist()) - {own})
        values.append((b - a) / max(a, b))
    ids = list("abcdefghi")
    assert silhouette(x, labels, 9, 0, ids) == pytest.approx(np.mean(values), abs=1e-6)


def test_map_matches_svd_whatever_the_order():
    x, _, ids = blobs(200, 4)
    points = project_2d(x, ids)
    u, s, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(u[:, :2] * s[:2]), rtol=1e-3, atol=1e-3)
    order = np.random.default_rng(0).permutation(200)
    assert project_2d(x[order], [ids[i] for i in order]).tobytes() == points[order].tobytes()
    assert project_2d(x[:, :1], ids)[:, 1].tolist() == [0.0] * 200


def test_size_is_met_and_quotas_are_proportional():
    x, truth, ids = blobs(1000, 4)
    result = select(Diversity(size=100, clusters=4), frame(x, ids))
    assert result.kept.len() == 100
    assert not result.vacuous
    kept = np.isin(ids, result.kept.to_list())
    np.testing.assert_allclose(np.bincount(truth[kept]), np.bincount(truth) / 10, atol=1)
    assert result.tables["quotas"]["quota"].sum() == 100
    removed = result.removed
    assert (removed["reason"] == "not_shortlisted").all()
    assert (removed["value"] > removed["threshold"]).all()


def test_planted_duplicate_heavy_cluster_cannot_exceed_an_equal_quota():
    x, _, ids = blobs(500, 5)
    x[100:] = x[100]  # 401 copies of one prompt
    kept = select(Diversity(size=50, clusters=5, quota="equal"), frame(x, ids)).kept.to_list()
    assert len(kept) == 50
    assert sum(i in set(ids[100:]) for i in kept) <= 15


def test_shuffled_split_input_gives_the_same_bytes():
    x, _, ids = blobs(300, 6, spread=1.0)
    table = frame(x, ids, score=np.linspace(0.1, 2, 300))
    selector = Diversity(size=40, weight="score", seed=7)
    whole = select(selector, table)
    shuffled = table.sample(fraction=1, shuffle=True, seed=1)
    parts = [shuffled[:90], shuffled[90:200], shuffled[200:]]
    plan = selector.decide([selector.summarise(part) for part in parts])
    pieces = [selector.apply(part, plan) for part in parts]
    assert pl.concat([p.decisions for p in pieces]).sort("id").equals(whole.decisions)
    together = pl.concat([p.tables["clusters"] for p in pieces]).sort("prompt_id")
    assert together.equals(whole.tables["clusters"])
    assert plan.facts == whole.facts


def test_one_percent_more_prompts_changes_about_one_percent():
    ids = [digest("p", i)[:20] for i in range(10100)]
    labels = np.array([int(i[:2], 16) % 20 for i in ids])

    def kept(n):
        order = np.argsort(ids[:n])  # so that new prompts land between the old ones
        own = labels[order]
        names = [ids[i] for i in order]
        ranks, quotas = draw(names, own, np.ones(n), n // 5, "proportional", 0)
        return {names[i] for i in np.flatnonzero(ranks <= quotas[own])}

    before, after = kept(10000), kept(10100)
    assert len(before) == 2000
    assert len(after) == 2020
    assert len(before - after) / len(before) < 0.02


def test_draw_is_uniform_in_a_cluster_and_follows_weights():
    ids = [f"{i:03d}" for i in range(20)]
    labels = np.zeros(20, dtype=int)
    weights = np.ones(20)
    counts = np.zeros(20)
    weighted = np.zeros(20)
    weights[3] = 10.0
    for seed in range(2000):
        counts += draw(ids, labels, np.ones(20), 1, "equal", seed)[0] <= 1
        weighted += draw(ids, labels, weights, 1, "equal", seed)[0] <= 1
    chi = ((counts - 100) ** 2 / 100).sum()
    assert chi < 43.8  # 99.9 % point of chi-square with 19 degrees of freedom
    assert abs(weighted[3] / 2000 - 10 / 29) < 0.04


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 60), st.integers(0, 9))
def test_draw_always_keeps_exactly_the_size(labels, size, seed):
    ids = [str(i) for i in range(len(labels))]
    own = np.unique(labels, return_inverse=True)[1]
    size = min(size, len(ids))
    ranks, quotas = draw(ids, own, np.ones(len(ids)), size, "equal", seed)
    assert (ranks <= quotas[own]).sum() == size == quotas.sum()
    assert (quotas <= np.bincount(own)).all()


def test_everything_fits_is_vacuous_but_clusters_are_made():
    x, _, ids = blobs(50, 3)
    for size in (50, 99, None):
        result = select(Diversity(size=size), frame(x, ids))
        assert result.vacuous
        assert result.kept.len() == 50
        assert result.tables["clusters"]["cluster"].n_unique() == default_clusters(50) == 5
    empty = select(Diversity(size=3), frame(x[:0], []))
    assert empty.vacuous
    assert empty.decisions.is_empty()
    assert select(Diversity(size=1), frame(x[:1], ids[:1])).kept.to_list() == ids[:1]


def test_missing_scores_are_refused():
    x, _, ids = blobs(5, 2)
    with pytest.raises(ValueError, match="1 prompts have no score"):
        select(Diversity(2, weight="score"), frame(x, ids, score=[1.0, None, 1, 1, 1]))
    with pytest.raises(ValueError, match="no weight column 'quality'"):
        select(Diversity(2, weight="quality"), frame(x, ids))
    with pytest.raises(ValueError, match="size is 0"):
        Diversity(0)


def test_expand_carries_prompts_to_rows():
    x, _, ids = blobs(30, 3)
    prompts = select(Diversity(size=10, clusters=3), frame(x, ids))
    rows = pl.DataFrame(
        {"id": [p + s for p in ids for s in "ab"], "prompt_id": [p for p in ids for _ in "ab"]}
    )
    result = expand(prompts, rows)
    assert result.kept.to_list() == sorted(p + s for p in prompts.kept for s in "ab")
    assert (result.removed["reason"] == "not_shortlisted").all()
    assert result.decisions.height == 60
    with pytest.raises(ValueError, match="not decided, first zz"):
        expand(prompts, pl.DataFrame({"id": ["zz1"], "prompt_id": ["zz"]}))


def test_shortlist_size():
    assert shortlist_size(1000, 2.0, 0.5) == 4000
    assert shortlist_size(10, 1.1, 1.0) == 11
    assert shortlist_size(3, 1.0, 2.0) == 2
    with pytest.raises(ValueError, match="keep rate 0"):
        shortlist_size(10, 2.0, 0.0)
