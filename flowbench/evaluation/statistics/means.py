"""Intervals of one algorithm's gain and of the difference between two, over seeds and prompts together."""

from __future__ import annotations

import numpy as np

from flowbench.errors import UsageError
from flowbench.evaluation.statistics.crossed import LIKE, Interval, Over, interval, mean_squares
from flowbench.evaluation.statistics.gains import Gains

TRIMMED = 0.25  # at either end


def mean_gain(gains: Gains, algorithm: str, over: Over = LIKE, level: float = 0.95) -> Interval:
    """The mean gain over seeds and prompts.

    Raises UsageError as `Gains.of`.
    """
    return interval(mean_squares(gains.of(algorithm)), over, level, gains.failures(algorithm))


def difference(gains: Gains, one: str, other: str, over: Over = LIKE, level: float = 0.95) -> Interval:
    """Mean gain of one minus that of the other, paired by prompt and by seed, over the seeds that both have finished.

    The interval is of this one pair; `compare` has all pairs of a table. Raises UsageError for an unknown algorithm or
    a pair without a common seed.
    """
    mine, theirs = _common(gains, one, other)
    return interval(mean_squares(mine - theirs), over, level, gains.failures(one, other))


def interquartile_mean(gains: Gains, algorithm: str, over: Over = LIKE, level: float = 0.95) -> Interval:
    """The mean of the middle half of all K P gains (Agarwal et al. 2021, arXiv:2108.13264), which no outlier moves.

    The interval is that of Tukey and McLaughlin (1963, Sankhya A 25, 331-352), a trimmed mean varies as the mean of the
    winsorised values divided by the share that is kept, with the standard error of `mean_gain`. Where more than
    half of the gains are equal, the interval has no width and says little: read the mean instead.
    Raises UsageError as `Gains.of`.
    """
    values = gains.of(algorithm)
    ordered = np.sort(values, axis=None)
    cut = int(TRIMMED * len(ordered))
    middle = ordered[cut : len(ordered) - cut]
    winsorised = np.clip(values, middle[0], middle[-1])
    ms = mean_squares((winsorised - winsorised.mean()) / (1 - 2 * TRIMMED) + middle.mean())
    return interval(ms, over, level, gains.failures(algorithm))


def probability_of_improvement(gains: Gains, one: str, other: str, over: Over = LIKE, level: float = 0.95) -> Interval:
    """How probable it is that one algorithm's gain is above the other's on the same prompt and noise, in [0, 1].

    A tie counts one half (Agarwal et al. 2021, arXiv:2108.13264, section 4.3, there for unpaired runs). The interval is
    cut at 0 and 1. Raises UsageError as `difference`.
    """
    mine, theirs = _common(gains, one, other)
    better = (np.sign(mine - theirs) + 1) / 2
    found = interval(mean_squares(better), over, level, gains.failures(one, other))
    if found.low is None or found.high is None:
        return found
    low, high = max(found.low, 0.0), min(found.high, 1.0)
    return Interval(found.value, low, high, over, found.seeds, found.prompts, found.failed)


def _common(gains: Gains, one: str, other: str) -> np.ndarray:
    both = gains.paired(one, other)
    if not both.shape[1]:
        raise UsageError(f"'{one}' and '{other}' have no finished seed in common; run the same seeds of both")
    return both
