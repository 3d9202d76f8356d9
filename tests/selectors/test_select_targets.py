"""Methods that select towards a target: known answers, planted data, independent computations."""

import numpy as np
import polars as pl
import pytest
from scipy.optimize import linprog
from scipy.stats import rankdata, spearmanr

from siftline.selectors.method import select
from siftline.selectors.nearest import RdsPlus, SimCore, by_turns
from siftline.selectors.spending import Budget
from siftline.selectors.transport import GotD, calibrated


def ids(n, prefix=""):
    """Ids in the order of numbers, so that places and ids agree."""
    return [f"{prefix}{i:05d}" for i in range(n)]


def vectors(x, names=None, **columns):
    x = np.asarray(x, dtype=np.float32)
    column = pl.Series("embedding", x, dtype=pl.Array(pl.Float32, x.shape[1]))
    return pl.DataFrame({"id": names or ids(len(x)), **columns}).with_columns(column)


def places(selection):
    """Kept places in the order of their ranks."""
    ranked = selection.decisions.join(selection.tables["ranks"], on="id").filter("kept")
    return [int(i[-5:]) for i in ranked.sort("rank")["id"]]


def cosine_targets(scores):
    """A pool and targets whose cosines are the given matrix, shape (q, n)."""
    scores = np.asarray(scores)
    q = len(scores)
    rest = np.sqrt(np.maximum(0, 1 - (scores**2).sum(axis=0)))
    assert ((scores**2).sum(axis=0) <= 1 + 1e-9).all()
    return vectors(np.vstack([scores, rest]).T), vectors(np.eye(q, q + 1), ids(q, "t"))


# ---- targets ---------------------------------------------------------------------------------

KNOWN = [[0.9, 0.8, 0.1, 0.0, 0.3], [0.95, 0.2, 0.7, 0.6, 0.1]]


def test_round_robin_takes_what_the_definition_takes():
    scores = np.array(KNOWN, np.float32)
    found = by_turns(lambda a, b: scores.T[a:b], 2, ["q0", "q1"], np.ones(5, int), Budget(4))
    assert found.order.tolist() == [0, 2, 1, 3]
    assert found.tables["picks"]["taker"].to_list() == ["q0", "q1", "q0", "q1"]


def test_rds_equals_a_plain_all_pairs_computation():
    g = np.random.default_rng(1)
    x, y = g.normal(size=(300, 10)), g.normal(size=(6, 10))
    pool, target = vectors(x), vectors(y, ids(6, "t"))
    unit_x, unit_y = (v / np.linalg.norm(v, axis=1)[:, None] for v in (x, y))
    left = unit_y @ unit_x.T
    expected = []
    while len(expected) < 50:
        for q in range(6):
            if len(expected) < 50:
                expected.append(int(left[q].argmax()))
                left[:, expected[-1]] = -9
    found = select(RdsPlus(), pool, Budget(50), target)
    assert places(found) == expected
    picks = found.tables["picks"]
    counts = picks["taker"].value_counts()["count"]
    assert counts.max() - counts.min() <= 1


def test_leaked_queries_are_taken_first():
    g = np.random.default_rng(2)
    y = g.normal(size=(5, 8))
    x = np.vstack([g.normal(size=(60, 8)), y])
    found = select(RdsPlus(), vectors(x), Budget(5), vectors(y, ids(5, "t")))
    assert sorted(places(found)) == [60, 61, 62, 63, 64]


def test_tasks_take_turns_by_the_best_of_their_queries():
    pool, target = cosine_targets(
        [[0.9, 0.1, 0.2, 0.3], [0.1, 0.8, 0.3, 0.2], [0.2, 0.3, 0.7, 0.1]]
    )
    target = target.with_columns(source=pl.Series(["b", "a", "b"]))
    found = select(RdsPlus("task"), pool, Budget(4), target)
    # a: row 1; b: row 0 (0.9 over 0.7); a: 2 (0.3) before 3 (0.2); b: 3
    assert places(found) == [1, 0, 2, 3]
    assert found.tables["picks"]["taker"].to_list() == ["a", "b", "a", "b"]
    with pytest.raises(ValueError, match="set turns to query"):
        select(RdsPlus("task"), pool, Budget(2), target.drop("source"))


def test_lists_that_run_out_are_asked_for_again():
    # All queries want the same rows in the same order: lists of a fair share cannot suffice.
    y = np.tile([1.0, 0.0], (40, 1))
    angles = np.linspace(0.01, 1.5, 2000)
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = select(RdsPlus(), vectors(x), Budget(900), vectors(y, ids(40, "t")))
    assert places(found) == list(range(900))
    assert found.facts["list_length"] > 4 * 900 / 40 + 64


def test_cats_and_dogs():
    x = np.array([[0.0]] * 99 + [[1.0]])
    y = np.array([[0.0]] * 5 + [[1.0]] * 5)
    method = GotD(cost="euclidean", epsilon=0.01, tolerance=1e-4)
    found = select(method, vectors(x), Budget(1), vectors(y, ids(10, "t")))
    assert places(found) == [99]
    assert found.facts["converged"]
    assert found.facts["transport"] == pytest.approx(0.49, abs=0.02)
    values = found.decisions["value"].to_numpy()
    assert values[99] == pytest.approx(-1.0, abs=0.02)
    np.testing.assert_allclose(values[:99], 1 / 99, atol=1e-3)
    assert 99 not in places(
        select(GotD(cost="euclidean", away=True), vectors(x), Budget(5), vectors(y, ids(10, "t")))
    )


def test_calibration_ranks_as_the_potential_and_forgets_constants():
    f = np.random.default_rng(0).normal(size=50)
    gradients = calibrated(f)
    assert (rankdata(gradients) == rankdata(f)).all()
    np.testing.assert_allclose(calibrated(f + 3), gradients, atol=1e-12)
    np.testing.assert_allclose(gradients[7], f[7] - np.delete(f, 7).mean())
    assert calibrated(np.array([2.0])).tolist() == [0.0]


def test_planted_rows_of_the_target_cloud_are_found_and_part_of_the_pool_suffices():
    g = np.random.default_rng(3)
    x = np.vstack([g.normal(size=(360, 6)), g.normal(size=(40, 6)) + 2])
    x, y = (v / np.linalg.norm(v, axis=1)[:, None] for v in (x, g.normal(size=(30, 6)) + 2))
    pool, target = vectors(x), vectors(y, ids(30, "t"))
    for method in (GotD(), GotD(solve_rows=150)):
        kept = places(select(method, pool, Budget(40), target))
        assert sum(i >= 360 for i in kept) > 24  # 4 by chance
    assert not select(GotD(tolerance=1e-9, max_iterations=2), pool, Budget(4), target).facts[
        "converged"
    ]


def test_the_pool_as_its_own_target_has_nearly_level_gradients():
    x = np.random.default_rng(4).normal(size=(80, 4))
    near = select(GotD(epsilon=0.05), vectors(x), Budget(2), vectors(x, ids(80, "t")))
    far = select(GotD(epsilon=0.05), vectors(x), Budget(2), vectors(x + 3, ids(80, "t")))
    spread = [s.decisions["value"].std() for s in (near, far)]
    assert spread[0] < 0.05 * spread[1]


def on_a_sphere(seed=0, n=300, d=64, kinds=8):
    """Embeddings as sentence models give them: unit length, kinds far apart, spread within."""
    g = np.random.default_rng(seed)
    kind = g.integers(0, kinds, n)
    x = g.normal(size=(kinds, d))[kind] + 0.9 * g.normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1)[:, None]).astype(np.float32), kind


def test_epsilon_means_the_same_at_any_length_of_the_vectors():
    x, _ = on_a_sphere()
    pool, target = x[20:], x[:20]
    found = [
        select(GotD(), vectors(c * pool), Budget(40), vectors(c * target, ids(20, "t")))
        for c in (1.0, 16.0, 0.125)
    ]
    assert places(found[0]) == places(found[1]) == places(found[2])
    costs = ((pool[:, None].astype(float) - target) ** 2).sum(axis=2)
    facts = found[0].facts
    assert facts["mean_cost"] == pytest.approx(costs.mean(), rel=1e-5)
    assert facts["epsilon"] == pytest.approx(0.02 * costs.mean(), rel=1e-5)
    assert found[1].facts["epsilon"] == pytest.approx(256 * facts["epsilon"], rel=1e-5)


def test_on_vectors_of_unit_length_the_duals_are_not_a_mean_distance():
    """Beside exact duals by linear programming, and the ranking that large epsilons end in."""
    x, _ = on_a_sphere(n=90)
    pool, target = x[15:], x[:15]
    costs = ((pool[:, None].astype(float) - target) ** 2).sum(axis=2)
    n, m = costs.shape
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    weights = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    exact = linprog(costs.ravel(), A_eq=sums, b_eq=weights, method="highs").eqlin.marginals[:n]

    def value(epsilon):
        method = GotD(epsilon=epsilon, tolerance=1e-3)
        found = select(method, vectors(pool), Budget(5), vectors(target, ids(15, "t")))
        ours = found.decisions.sort("id")["value"].to_numpy()
        told = found.facts["mean_cost_correlation"]
        assert told == pytest.approx(spearmanr(ours, costs.mean(axis=1)).statistic, abs=1e-3)
        return spearmanr(ours, exact).statistic, told

    (near, told), (far, blurred) = value(GotD().epsilon), value(20.0)
    assert near > 0.95
    assert blurred > 0.99  # the mean distance, whatever the plan
    assert told < blurred - 0.05
    assert far < near


def test_one_place_and_level_duals_are_no_error():
    same = vectors(np.ones((6, 3)))
    found = select(GotD(), same, Budget(2), vectors(np.ones((2, 3)), ids(2, "t")))
    assert (places(found), found.facts["mean_cost_correlation"]) == ([0, 1], None)


# ---- SimCore ---------------------------------------------------------------------------------

CENTROIDS = [[0.99, 0.97, 0.90, 0.2, 0.1, 0.0], [0.1, 0.2, 0.3, 0.98, 0.96, 0.80]]


def test_simcore_stops_where_the_known_answer_does():
    # The two centroids have a cosine of 0.2: orthogonal ones can't have these similarities.
    first, second = np.array(CENTROIDS)
    second = (second - 0.2 * first) / np.sqrt(0.96)
    pool = vectors(np.stack([first, second, np.sqrt(1 - first**2 - second**2)], axis=1))
    target = vectors([[1, 0, 0], [0.2, np.sqrt(0.96), 0]], ids(2, "t"))
    found = select(SimCore(patience=1), pool, Budget(6), target)
    assert sorted(places(found)) == [0, 1, 3, 4]
    np.testing.assert_allclose(found.facts["utility"], [0.985, 0.965, 0.85], atol=1e-4)
    assert (found.facts["stop_turn"], found.facts["stop_reason"]) == (3, "utility")
    assert found.facts["shortfall"] == 0
    whole = select(SimCore(patience=1, tau=0.0), pool, Budget(6), target)
    assert (len(places(whole)), whole.facts["stop_reason"]) == (6, "budget")
    strict = select(SimCore(patience=1, tau=1.0), pool, Budget(6), target)
    assert sorted(places(strict)) == [0, 3]
    cut = select(SimCore(patience=1), pool, Budget(3), target)
    assert {0, 3} < set(places(cut)) < {0, 1, 3, 4}


def test_utility_falls_and_two_centroids_may_agree():
    pool, target = cosine_targets([[0.7, 0.6, 0.1, 0.3], [0.7, 0.1, 0.5, 0.2]])
    found = select(SimCore(stop=False), pool, Budget(3), target)
    assert places(found)[0] == 0
    assert sorted(places(found)) == [0, 1, 2]
    g = np.random.default_rng(0)
    pool, target = vectors(g.normal(size=(200, 5))), vectors(g.normal(size=(50, 5)), ids(50, "t"))
    found = select(SimCore(clusters=7, stop=False), pool, Budget(100), target)
    assert found.facts["target_clusters"] == 7
    assert (np.diff(found.facts["utility"]) <= 1e-6).all()
