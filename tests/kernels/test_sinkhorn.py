"""Entropic transport against exact linear programming, a dense solver and known answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import spearmanr

from siftline.kernels.vectors import sinkhorn as module
from siftline.kernels.vectors.sinkhorn import sinkhorn, soft_transform


def costs(x, y, kind="squared"):
    squared = ((x[:, None].astype(np.float64) - y[None]) ** 2).sum(axis=2)
    if kind == "cosine":
        norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1)
        return 1 - (x @ y.T) / norms
    return squared if kind == "squared" else np.sqrt(squared)


def exact(c):
    """Cost and the candidates' duals by linear programming."""
    n, m = c.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    weights = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    done = linprog(c.ravel(), A_eq=np.vstack([rows, columns]), b_eq=weights, method="highs")
    assert done.success
    return done.fun, done.eqlin.marginals[:n]


def dense(c, epsilon, sweeps):
    """Plain Sinkhorn in float64 on the whole matrix."""
    g = np.zeros(c.shape[1])

    def soft(z, axis):
        top = z.max(axis=axis, keepdims=True)
        return (top + np.log(np.exp(z - top).mean(axis=axis, keepdims=True))).squeeze(axis)

    for _ in range(sweeps):
        f = -epsilon * soft((g - c) / epsilon, 1)
        g = -epsilon * soft((f[:, None] - c) / epsilon, 0)
    return -epsilon * soft((g - c) / epsilon, 1), g


def cloud(n, d, seed, shift=0.0):
    return (np.random.default_rng(seed).normal(size=(n, d)) + shift).astype(np.float32)


@pytest.mark.parametrize("kind", ["squared", "euclidean", "cosine"])
@pytest.mark.parametrize("momentum", [1.0, 1.3])
def test_potentials_are_those_of_a_dense_solver(kind, momentum):
    x, y = cloud(60, 5, 0), cloud(23, 5, 1, shift=0.5)
    found = sinkhorn(
        x, y, cost=kind, epsilon=0.3, tolerance=1e-5, max_iterations=3000, momentum=momentum
    )
    assert found.converged
    f, g = dense(costs(x, y, kind), 0.3, 3000)
    # A constant may move from one side to the other.
    np.testing.assert_allclose(found.f - found.f.mean(), f - f.mean(), atol=2e-4)
    np.testing.assert_allclose(found.g - found.g.mean(), g - g.mean(), atol=2e-4)
    assert found.value == pytest.approx(f.mean() + g.mean(), abs=2e-4)


def test_towards_no_regularisation_it_is_the_linear_program():
    x, y = cloud(24, 3, 2), cloud(9, 3, 3, shift=0.7)
    value, duals = exact(costs(x, y))
    near = []
    for epsilon in (1.0, 0.1, 0.01):
        found = sinkhorn(x, y, epsilon=epsilon, tolerance=1e-3, max_iterations=20_000, momentum=1.5)
        near.append((abs(found.value - value), spearmanr(found.f, duals).statistic))
    assert near[2][0] < 0.02 * value
    assert near[0][0] > near[1][0] > near[2][0]
    assert near[2][1] > 0.99


def test_cats_and_dogs():
    x = np.array([[0.0]] * 99 + [[1.0]], np.float32)
    y = np.array([[0.0]] * 5 + [[1.0]] * 5, np.float32)
    found = sinkhorn(x, y, cost="euclidean", epsilon=0.01, tolerance=1e-6, max_iterations=5000)
    gradients = found.f - (found.f.sum() - found.f) / 99
    np.testing.assert_allclose(gradients[:99], 1 / 99, atol=1e-3)
    assert gradients[99] == pytest.approx(-1.0, abs=0.02)
    assert found.value == pytest.approx(0.49, abs=0.02)


def test_the_potential_is_the_derivative_of_the_cost():
    # Moving weight e to row i changes the exact cost by e (f_i - mean f).
    x, y = cloud(12, 2, 4), cloud(7, 2, 5, shift=1)
    c = costs(x, y)
    before, _ = exact(c)
    found = sinkhorn(x, y, epsilon=0.01, tolerance=1e-5, max_iterations=50_000, momentum=1.5)
    e = 1e-3
    for i in (0, 5):
        weights = np.full(12, (1 - e) / 12)
        weights[i] += e
        sums = np.vstack([np.kron(np.eye(12), np.ones(7)), np.kron(np.ones(12), np.eye(7))])
        b = np.concatenate([weights, np.full(7, 1 / 7)])
        after = linprog(c.ravel(), A_eq=sums, b_eq=b, method="highs").fun
        assert (after - before) / e == pytest.approx(found.f[i] - found.f.mean(), abs=0.05)


def test_blocks_and_copies_change_nothing(monkeypatch):
    x, y = cloud(500, 4, 6), cloud(11, 4, 7)
    x[400] = x[2]
    whole = sinkhorn(x, y, epsilon=0.2)
    assert whole.f[400] == whole.f[2]
    monkeypatch.setattr(module, "block_rows", lambda columns: 64)
    cut = sinkhorn(x, y, epsilon=0.2)
    np.testing.assert_allclose(cut.f, whole.f, atol=1e-5)
    assert cut.iterations == whole.iterations


def test_what_did_not_converge_is_told():
    x, y = cloud(30, 3, 8), cloud(10, 3, 9, shift=2)
    found = sinkhorn(x, y, epsilon=0.01, tolerance=1e-6, max_iterations=3)
    assert (found.converged, found.iterations) == (False, 3)
    assert found.error > 1e-6
    assert np.isfinite(found.f).all()


def test_tiny_epsilon_stays_finite():
    found = sinkhorn(cloud(20, 3, 1), cloud(20, 3, 2), epsilon=1e-4, max_iterations=50)
    assert np.isfinite(found.f).all()
    assert np.isfinite(found.g).all()


def test_a_solution_extends_to_rows_that_took_no_part():
    x, y = cloud(80, 4, 3), cloud(15, 4, 4)
    found = sinkhorn(x[:60], y, epsilon=0.3, tolerance=1e-4)
    more = soft_transform(x, y, found.g, cost="squared", epsilon=0.3)
    np.testing.assert_allclose(more[:60], found.f, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 2**31))
def test_any_clouds_end_with_balanced_marginals(n, m, seed):
    x, y = cloud(n, 3, seed), cloud(m, 3, seed + 1)
    found = sinkhorn(x, y, epsilon=0.5, tolerance=1e-4, max_iterations=5000)
    assert found.converged
    plan = np.exp((found.f[:, None] + found.g - costs(x, y)) / 0.5) / (n * m)
    np.testing.assert_allclose(plan.sum(axis=1), 1 / n, rtol=1e-3)
    np.testing.assert_allclose(plan.sum(axis=0), 1 / m, rtol=5e-3, atol=2e-4)
