"""Ordinary least squares with what one needs to distrust it: intervals, fit, collinearity."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fit:
    """A line through n observations of k standardised columns.

    Attributes:
        intercept: Prediction at the means.
        coefficients: Change of the prediction for one standard deviation, shape (k,).
        low: Lower ends of their intervals, shape (k,).
        high: Upper ends, shape (k,).
        means: Means of the columns, shape (k,).
        scales: Standard deviations of the columns, shape (k,).
        inflation: Variance inflation factors, shape (k,): 1 for a column the others say nothing
            about; above 10 a coefficient, and its sign, should not be read.
        r_squared: Share of the variance explained.
        observations: n.
    """

    intercept: float
    coefficients: np.ndarray
    low: np.ndarray
    high: np.ndarray
    means: np.ndarray
    scales: np.ndarray
    inflation: np.ndarray
    r_squared: float
    observations: int


def least_squares(x: np.ndarray, y: np.ndarray, confidence: float = 0.95) -> Fit:
    """Fits y by the columns of x.

    Args:
        x: Observations, shape (n, k).
        y: What is predicted, shape (n,).
        confidence: Of the intervals (Student's t with n - k - 1 degrees of freedom).

    Raises:
        ValueError: if there are fewer than k + 2 observations, a number is not finite, a column
            does not vary, or columns determine each other.
    """
    from scipy.stats import t

    n, k = x.shape
    if n < k + 2:
        raise ValueError(f"{n} observations for {k} columns: give at least {k + 2}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("an observation is not finite: leave it out")
    means, scales = x.mean(axis=0), x.std(axis=0)
    flat = np.flatnonzero(scales <= 1e-12 * np.maximum(1, np.abs(means)))
    if len(flat):
        raise ValueError(f"column {int(flat[0])} does not vary: leave it out")
    z = (x - means) / scales
    gram = z.T @ z / n
    if np.linalg.cond(gram) > 1e10:
        raise ValueError("columns determine each other: leave one out")
    inverse = np.linalg.inv(gram)
    coefficients = inverse @ (z.T @ (y - y.mean())) / n
    left = y - y.mean() - z @ coefficients
    spread = np.sqrt((left @ left) / (n - k - 1) * np.diag(inverse) / n)
    half = t.ppf((1 + confidence) / 2, n - k - 1) * spread
    total = float(((y - y.mean()) ** 2).sum())
    return Fit(
        float(y.mean()),
        coefficients,
        coefficients - half,
        coefficients + half,
        means,
        scales,
        np.diag(inverse).copy(),
        1 - float(left @ left) / total if total else 0.0,
        n,
    )
