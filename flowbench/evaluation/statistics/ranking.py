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

    At most 1 - level of tables make any false claim: exclude a method from the first place that no other surpasses, or
    call a pair different that is equal. unfinished: methods without a finished run, which have no standing.
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
    places = list(combinations(range(len(names)), 2))
    pairs = _pairs(gains, [(names[i], names[j]) for i, j in places], len(names), over, level)
    losses = np.ones((len(names), len(names)))
    for (i, j), pair in zip(places, pairs, strict=True):
        losses[(j, i) if pair.difference.value > 0 else (i, j)] = pair.p
    first, best, worst = ranks(losses, level)
    standings = tuple(
        Standing(name, means[name], bool(first[i]), (int(best[i]), int(worst[i]))) for i, name in enumerate(names)
    )
    unfinished = tuple(a for a in gains.algorithms if a not in finished)
    return Ranking(standings, tuple(pairs), over, level, unfinished)


def ranks(losses: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who shares the first place, and the best and worst rank of each method, (A,) each.

    losses (A, A): entry (i, j) is the two-sided p of the pair where i has the smaller mean, else 1.
    """
    methods = len(losses)
    upper = np.triu_indices(methods, 1)
    adjusted = holm(np.minimum(losses, losses.T)[upper])
    corrected = np.ones_like(losses)
    corrected[upper], corrected.T[upper] = adjusted, adjusted
    worse = (corrected <= 1 - level) & (losses < 1)
    # Holm's pairs never part the methods that are left; one that has left may still beat one of them.
    first = contenders(losses, level) & ~worse.any(1)
    return first, np.maximum(1 + worse.sum(1), np.where(first, 1, 2)), methods - worse.sum(0)


def holm(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values of m hypotheses, (..., m), step-down (Holm 1979, Scand. J. Statist. 6, 65-70)."""
    m, order = p.shape[-1], np.argsort(p, axis=-1)
    steps = np.minimum(np.take_along_axis(p, order, -1) * np.arange(m, 0, -1), 1.0)
    adjusted = np.empty_like(steps)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(steps, -1), -1)
    return adjusted


def contenders(losses: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Who is left by comparisons with the best, (A,) bool; losses as in `ranks`."""
    alive = np.ones(len(losses), dtype=bool)
    while (left := int(alive.sum())) > 1:
        among = np.where(np.outer(alive, alive), losses, 1.0)
        loser = np.unravel_index(np.argmin(among), losses.shape)[0]
        if among.min() * left * (left - 1) / 2 > 1 - level:
            break
        alive[loser] = False
    return alive


def prior_df(methods: int, own_df: np.ndarray) -> np.ndarray:
    """The weight of the table's mean square beside own_df of a pair's own; the other pairs of a small table know less."""
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


def _pairs(gains: Gains, names: Sequence[tuple[str, str]], methods: int, over: Over, level: float) -> list[Pair]:
    """All pairs of a table of so many methods."""
    if not names:
        return []
    both = [gains.paired(one, other) for one, other in names]
    usable = [k for k, values in enumerate(both) if values.shape[1]]
    each = [mean_squares(both[k][0] - both[k][1]) for k in usable]
    ms = moderated(_stack(each), methods) if each else None
    halves = dict(zip(usable, half_width(ms, over, level), strict=True)) if ms else {}
    p = np.ones(len(names))
    if ms:
        p[usable] = p_values(ms, over)
    corrected = holm(p)
    pairs = []
    for k, (one, other) in enumerate(names):
        value = float((both[k][0] - both[k][1]).mean()) if k in halves else float("nan")
        half = float(halves.get(k, np.nan))
        ends = (None, None) if np.isnan(half) else (value - half, value + half)
        seeds, prompts = both[k].shape[1:]
        found = Interval(value, ends[0], ends[1], over, seeds, prompts, gains.failures(one, other))
        pairs.append(Pair(one, other, found, float(p[k]), float(corrected[k])))
    return pairs


def _stack(each: Sequence[MeanSquares]) -> MeanSquares:
    """Mean squares of single arrays, side by side."""
    names = ("mean", "by_seed", "by_prompt", "residual", "seeds", "seeds_df")
    return MeanSquares(**{n: np.stack([getattr(ms, n) for ms in each]) for n in names}, prompts=each[0].prompts)
