"""Means with bootstrap intervals: examples are drawn again and again, with replacement (Efron 1979)."""

from dataclasses import dataclass

import numpy as np

RESAMPLES, LEVEL, SEED = 10_000, 0.95, 0
_DRAWN_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A mean, and the two ends of its percentile interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: np.ndarray, weights: np.ndarray | None = None) -> Interval:
    """Return the weighted mean of `values` and its percentile bootstrap interval.

    The same input gives the same interval. For a change between two models, give the differences of the pairs: an
    example that is hard for both then widens nothing.

    Args:
        values: float [n], one for each example; n is 1 or more.
        weights: float [n], above 0; None weighs all alike.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if np.ptp(values) <= 1e-12 * np.abs(values).max():  # alike, but for rounding
        return Interval(*[float(values[0])] * 3)
    means = _resample_means(values, weights)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values @ weights / weights.sum()), float(low), float(high))


def _resample_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    rng, count = np.random.default_rng(SEED), len(values)
    rows = max(1, _DRAWN_AT_ONCE // count)
    weighted, means = values * weights, np.empty(RESAMPLES)
    for first in range(0, RESAMPLES, rows):
        last = min(first + rows, RESAMPLES)
        drawn = rng.integers(0, count, size=(last - first, count))
        means[first:last] = weighted[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    return means
