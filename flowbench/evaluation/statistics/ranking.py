"""All pairs of a table: differences, Holm's correction, who shares the first place, and which ranks are possible.

Every pair has a moderated t: a few seeds cannot estimate the variance between seeds of each pair alone, and where they
underestimate it by chance they claim differences that are none. So its mean square is averaged with what the whole
table says (Smyth 2004, doi:10.2202/1544-6115.1027; the prior's weight is fixed, see PRIOR_DF).

The first place is given by multiple comparisons with the best, step-down: the methods that are still in are compared
in all pairs; if the smallest p-value, times the number of pairs, is at most 1 - level, its loser leaves; otherwise all
that are in share the place. It is the model confidence set of Hansen, Lunde and Nason (2011, doi:10.3982/ECTA5771) with
Bonferroni's bound in the place of a bootstrap: the bound needs no assumption on how pairs depend on each other. Hsu's
comparisons with the best (1984, doi:10.1214/aos/1176346732) promise only that a single best is kept; among equal
methods they exclude some in far more than 5 % of tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from flowbench.errors import UsageError
from flowbench.evaluation.statistics.crossed import (
    LIKE,
    Interval,
    MeanSquares,
    Over,
    half_width,
    mean_squares,
    p_values,
)
from flowbench.evaluation.statistics.gains import Gains
from flowbench.evaluation.statistics.means import mean_gain

# What the table says of the seeds' variance weighs as much as six degrees of freedom of a pair's own. Fixed, since a
# dozen methods cannot say how much their variances differ; chosen by the size of tables in docs/statistics.md, where a
# complete pooling fails when a few methods alone vary between seeds.
PRIOR_DF = 6

_NO_SEED = np.full((1, 1), np.nan)  # of a pair without a common seed nothing is known


@dataclass(frozen=True)
class Pair:
    """One minus other. difference: interval of this pair alone; p: two-sided; p_holm: corrected for all pairs."""

    one: str
    other: str
    difference: Interval
    p: float
    p_holm: float


@dataclass(frozen=True)
class Standing:
    """One method of a table. rank: the best and the worst that the pairs admit after Holm's correction."""

    algorithm: str
    gain: Interval
    shares_first: bool
    rank: tuple[int, int]


@dataclass(frozen=True)
class Ranking:
    """A table of methods, largest mean gain first, and all its pairs, in the order of the methods.

    At most 1 - level of tables exclude a method from the first place that no other surpasses, and at most as many call
    any pair different that is equal. unfinished: methods without a finished run, which have no standing.
    """

    standings: tuple[Standing, ...]
    pairs: tuple[Pair, ...]
    over: Over
    level: float
    unfinished: tuple[str, ...] = ()

    @property
    def first(self) -> tuple[str, ...]:
        """Who shares the first place."""
        return tuple(s.algorithm for s in self.standings if s.shares_first)


def compare(gains: Gains, over: Over = LIKE, level: float = 0.95) -> Ranking:
    """Compare all methods of a table.

    A pair without two common seeds has no interval, and p = 1. A method whose runs failed in part is compared by those
    that did not: `Interval.failed` says so. Raises UsageError when no method has a finished run.
    """
    finished = [a for a in gains.algorithms if np.isfinite(gains.paired(a, a)).any()]
    if not finished:
        raise UsageError("no algorithm has a finished run; there is nothing to compare")
    means = {a: mean_gain(gains, a, over, level) for a in finished}
    names = sorted(finished, key=lambda a: -means[a].value)
    couples = list(combinations(names, 2))
    both = [gains.paired(one, other) for one, other in couples]
    ms = _stack([mean_squares(a - b if len(a) else _NO_SEED) for a, b in both], gains.values.shape[-1])
    found = verdict(ms, len(names), over, level)
    halves = half_width(moderated(ms, len(names)), over, level)
    pairs = []
    for k, (one, other) in enumerate(couples):
        value, half, seeds = float(ms.mean[k]), float(halves[k]), both[k].shape[1]
        low, high = (None, None) if np.isnan(half) else (value - half, value + half)
        difference = Interval(value, low, high, over, seeds, ms.prompts, gains.failures(one, other))
        pairs.append(Pair(one, other, difference, float(found.p[k]), float(found.p_holm[k])))
    standings = [
        Standing(name, means[name], bool(found.first[i]), (int(found.best[i]), int(found.worst[i])))
        for i, name in enumerate(names)
    ]
    unfinished = tuple(a for a in gains.algorithms if a not in finished)
    return Ranking(tuple(standings), tuple(pairs), over, level, unfinished)


@dataclass(frozen=True, eq=False)
class Verdict:
    """Of A methods: p and p_holm (m,) of their pairs; first (A,) bool, best and worst rank (A,)."""

    p: np.ndarray
    p_holm: np.ndarray
    first: np.ndarray
    best: np.ndarray
    worst: np.ndarray


def verdict(ms: MeanSquares, methods: int, over: Over = LIKE, level: float = 0.95) -> Verdict:
    """What the m pairs of a table say; ms (m,) is of one method minus the other, in the order of np.triu_indices."""
    p = p_values(moderated(ms, methods), over)
    corrected = holm(p)
    one, other = np.triu_indices(methods, 1)
    loser, winner = np.where(ms.mean > 0, other, one), np.where(ms.mean > 0, one, other)
    worse = np.zeros((methods, methods), dtype=bool)
    worse[loser, winner] = corrected <= 1 - level
    first = contenders(ms, methods, over, level) & ~worse.any(1)  # so that no pair contradicts the first place
    best = np.maximum(1 + worse.sum(1), np.where(first, 1, 2))
    return Verdict(p, corrected, first, best, methods - worse.sum(0))


def holm(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values of m hypotheses, (..., m), step-down (Holm 1979, Scand. J. Statist. 6, 65-70)."""
    m, order = p.shape[-1], np.argsort(p, axis=-1)
    steps = np.minimum(np.take_along_axis(p, order, -1) * np.arange(m, 0, -1), 1.0)
    adjusted = np.empty_like(steps)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(steps, -1), -1)
    return adjusted


def contenders(ms: MeanSquares, methods: int, over: Over = LIKE, level: float = 0.95) -> np.ndarray:
    """Who is left by comparisons with the best, (A,) bool; ms as in `verdict`.

    At each step the seeds' variance is pooled over the methods that are still in: those that have left may vary less.
    """
    one, other = np.triu_indices(methods, 1)
    alive = np.ones(methods, dtype=bool)
    while (left := int(alive.sum())) > 1:
        pairs = np.flatnonzero(alive[one] & alive[other])
        p = p_values(moderated(_take(ms, pairs), left), over)
        if p.min() * len(pairs) > 1 - level:
            break
        pair = pairs[p.argmin()]
        alive[other[pair] if ms.mean[pair] > 0 else one[pair]] = False
    return alive


def prior_df(methods: int, own_df: np.ndarray) -> np.ndarray:
    """The weight of the table's mean square beside own_df of a pair's own; a small table has little to say."""
    return np.minimum(PRIOR_DF, max(methods - 2, 0) * own_df)


def moderated(ms: MeanSquares, methods: int) -> MeanSquares:
    """The mean squares of all pairs (..., m) of a table with the seeds' one averaged with the table's.

    The table's is the residual's times their mean ratio over pairs, which is at least 1. With two methods nothing
    changes.
    """
    scale = ms.residual if ms.prompts > 1 else np.ones_like(ms.by_seed)
    usable = (ms.seeds_df > 0) & (scale > 0)
    weight = np.where(usable, ms.seeds_df, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(usable, ms.by_seed / scale, 0.0)
        mean_ratio = (weight * ratio).sum(-1, keepdims=True) / weight.sum(-1, keepdims=True)
    if ms.prompts > 1:
        mean_ratio = np.maximum(mean_ratio, 1.0)
    prior = prior_df(methods, ms.seeds_df)
    df = ms.seeds_df + prior
    with np.errstate(invalid="ignore", divide="ignore"):
        pooled = (ms.seeds_df * ms.by_seed + prior * mean_ratio * scale) / df
    return replace(ms, by_seed=np.where(usable & (prior > 0), pooled, ms.by_seed), seeds_df=df)


_ARRAYS = ("mean", "by_seed", "by_prompt", "residual", "seeds", "seeds_df")


def _stack(each: Sequence[MeanSquares], prompts: int) -> MeanSquares:
    """Mean squares of single arrays, side by side."""
    return MeanSquares(**{n: np.array([getattr(ms, n) for ms in each], np.float64) for n in _ARRAYS}, prompts=prompts)


def _take(ms: MeanSquares, pairs: np.ndarray) -> MeanSquares:
    """The mean squares of some pairs."""
    return MeanSquares(**{n: getattr(ms, n)[pairs] for n in _ARRAYS}, prompts=ms.prompts)
