"""Numbers as the page has them."""

from __future__ import annotations

import math

from flowbench.evaluation.statistics import Interval, RankCorrelation
from flowbench.reporting.page.data import Number

DIGITS = 4


def rounded(value: float) -> float:
    """To four significant digits, or to a whole number where it is larger."""
    return float(round(value)) if abs(value) >= 10**DIGITS else float(f"{value:.{DIGITS}g}")


def number(found: Interval | RankCorrelation) -> Number:
    """An estimate and its interval, rounded."""
    low, high = found.low, found.high
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return Number(value=rounded(found.value))
    return Number(value=rounded(found.value), low=rounded(low), high=rounded(high))
