"""How the result of a search grows with its trials."""

from __future__ import annotations

import math
from collections.abc import Sequence


def expected_best(preferred: Sequence[float]) -> tuple[float, ...]:
    """What the best of k of n trials is worth in the mean over all subsets of k, for k = 1, ..., n.

    preferred: what each trial is worth, in the order in which a selection prefers them, the best first; their values
    need not fall in that order. The i-th of n is the best of a subset of k with probability C(n - i, k - 1) / C(n, k):
    order statistics without replacement, no sampling.
    """
    n = len(preferred)
    return tuple(
        sum(value * math.comb(n - i, k - 1) for i, value in enumerate(preferred, 1)) / math.comb(n, k)
        for k in range(1, n + 1)
    )
