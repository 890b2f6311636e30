"""How small a difference a number of seeds and prompts can show."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import special

from flowbench.evaluation.statistics.crossed import LIKE, THESE, Components, Over
from flowbench.evaluation.statistics.ranking import prior_df


def smallest_difference(
    components: Components,
    seeds: int,
    prompts: int,
    over: Over = LIKE,
    level: float = 0.95,
    power: float = 0.8,
    methods: int = 2,
) -> float:
    """The smallest true difference that a two-sided t test finds with probability `power`, in the scores' units.

    components: of the paired difference of two methods, or of one method's gain, as `components` finds them. The
    power is that of the noncentral t distribution. methods: in a table of how many the pair must differ, corrected for
    all its pairs and with the moderated t of `compare`; 2 is one pair alone. Infinite for a single seed and, over
    prompts like these, a single prompt.
    Raises ValueError for seeds or prompts below 1, fewer than two methods, and a level or power outside (0, 1).
    """
    if min(seeds, prompts, methods - 1) < 1 or not (0 < level < 1 and 0 < power < 1):
        raise ValueError("seeds and prompts are at least 1, methods 2, level and power lie between 0 and 1")
    if seeds < 2 or (over == LIKE and prompts < 2):
        return math.inf
    error, df = _expected(components, seeds, prompts, over, methods)
    if error == 0:
        return 0.0
    critical = float(special.stdtrit(df, 1 - (1 - level) / (methods * (methods - 1))))

    def lacking(shift: float) -> float:
        # scipy gives nan where the far tail is too small for it.
        far = np.nan_to_num(special.nctdtr(df, shift, -critical))
        return float(1 - special.nctdtr(df, shift, critical) + far) - power

    if lacking(0.0) >= 0:
        return 0.0
    end = critical + 1.0
    while lacking(end) < 0:
        end *= 2
    return error * _root(lacking, 0.0, end)


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that rises from below 0 crosses it; by halves, since scipy.optimize takes long to import."""
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def _expected(components: Components, seeds: int, prompts: int, over: Over, methods: int) -> tuple[float, float]:
    """Standard error of the mean and its degrees of freedom for these components, as `spread` estimates them."""
    seeds_df = seeds - 1 + float(prior_df(methods, np.array(seeds - 1)))
    residual = components.residual**2
    by_seed = residual + prompts * components.seeds**2
    if over == THESE:
        return math.sqrt(by_seed / (seeds * prompts)), seeds_df
    by_prompt = residual + seeds * components.prompts**2
    variance = by_prompt + by_seed - residual
    share = by_prompt**2 / (prompts - 1) + (by_seed**2 / seeds_df if by_seed > residual else 0.0)
    return math.sqrt(variance / (seeds * prompts)), variance**2 / share if share else 1.0
