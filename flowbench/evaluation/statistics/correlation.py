"""How well a judge orders checkpoints as the truth does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special


@dataclass(frozen=True)
class RankCorrelation:
    """A rank correlation in [-1, 1] with its interval over runs; low and high are None where it cannot be said.

    value is nan when judge or truth are the same for all checkpoints.
    """

    value: float
    low: float | None
    high: float | None
    kind: Literal["kendall", "spearman"]
    checkpoints: int
    runs: int


def rank_correlation(
    judge: np.ndarray,
    truth: np.ndarray,
    runs: np.ndarray,
    kind: Literal["kendall", "spearman"] = "kendall",
    level: float = 0.95,
) -> RankCorrelation:
    """Kendall's tau-b or Spearman's rho of a judge with the truth over n checkpoints, each (n,).

    runs (n,): which run a checkpoint is of. Checkpoints of one run resemble each other, so that the interval is over
    runs: the jackknife that leaves out one run at a time (Efron and Stein 1981, doi:10.1214/aos/1176345462), on
    Fisher's scale, with Student's t. It needs three runs.
    Raises ValueError for lengths that differ or values that are not finite.
    """
    judge, truth, runs = np.asarray(judge, np.float64), np.asarray(truth, np.float64), np.asarray(runs)
    if not judge.shape == truth.shape == runs.shape or judge.ndim != 1:
        raise ValueError(f"judge, truth and runs are of shapes {judge.shape}, {truth.shape} and {runs.shape}")
    if not (np.isfinite(judge).all() and np.isfinite(truth).all()):
        raise ValueError("judge or truth are not finite")
    value, names = _correlation(judge, truth, kind), np.unique(runs)
    low, high = None, None
    if len(names) > 2:
        without = [_correlation(judge[runs != name], truth[runs != name], kind) for name in names]
        if np.isfinite([value, *without]).all():
            low, high = _jackknife(value, np.array(without), level)
    return RankCorrelation(value, low, high, kind, len(judge), len(names))


def _correlation(judge: np.ndarray, truth: np.ndarray, kind: str) -> float:
    from scipy import stats

    if len(judge) < 2 or np.ptp(judge) == 0 or np.ptp(truth) == 0:
        return math.nan
    return float((stats.kendalltau if kind == "kendall" else stats.spearmanr)(judge, truth).statistic)


def _jackknife(value: float, without: np.ndarray, level: float) -> tuple[float, float]:
    """The interval from the values without each of n runs."""
    n, edge = len(without), 1 - 1e-12  # Fisher's scale has no end for a perfect correlation
    centre, each = np.arctanh(np.clip(value, -edge, edge)), np.arctanh(np.clip(without, -edge, edge))
    error = math.sqrt((n - 1) / n * ((each - each.mean()) ** 2).sum())
    half = special.stdtrit(n - 1, (1 + level) / 2) * error
    return float(np.tanh(centre - half)), float(np.tanh(centre + half))
