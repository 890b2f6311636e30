"""Intervals over prompts, by scipy's bootstrap."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000


def mean_ci95(values: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean of values (n,); (mean, mean) when all are equal.

    A single value says nothing of how far others lie from it: None.
    """
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return None
    if np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
