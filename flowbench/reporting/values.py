"""What the runs of a table say, as arrays: rows x seeds x prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from flowbench.evaluation.statistics import THESE, Gains, Interval, Over
from flowbench.evaluation.statistics.crossed import interval, mean_squares
from flowbench.record import Record
from flowbench.reporting.groups import Group
from flowbench.terms import plain_metric

LEVEL = 0.95
LOWER = ("w2", "kl")  # metrics of which less is better


class Values:
    """What one row's runs say, metric by metric: arrays (K, P) of base and tuned, P = 1 where prompts are not known."""

    def __init__(self, one: Group, split: str) -> None:
        self.base: dict[str, np.ndarray] = {}
        self.tuned: dict[str, np.ndarray] = {}
        self.whole: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # means over prompts, (K, 1)
        self.broken: dict[str, int] = {}
        self.seeds = [r.seed for r in one.finished]
        ends = [{key.split("/")[0] for key in r.scores if key.split("/")[1:] == [split]} for r in one.finished]
        # Judges may have been added between two seeds: a column is of the same runs in every row's cell.
        for metric in set.intersection(*ends) if ends else ():
            self._take(metric, f"{metric}/{split}", one.finished)

    @property
    def metrics(self) -> set[str]:
        """Names of the metrics that all runs have, whether or not they are finite."""
        return {*self.whole, *self.broken}

    def _take(self, metric: str, key: str, records: Sequence[Record]) -> None:
        scores = [r.scores[key] for r in records]
        wrong = sum(not (math.isfinite(s.base) and math.isfinite(s.tuned)) for s in scores)
        if wrong:
            self.broken[metric] = wrong
            return
        self.whole[metric] = (np.array([[s.base] for s in scores]), np.array([[s.tuned] for s in scores]))
        each = [r.per_prompt.get(key, {}) for r in records]
        lengths = {len(values.get(side, ())) for values in each for side in ("base", "tuned")}
        if len(lengths) == 1 and lengths != {0}:
            base, tuned = (np.array([v[side] for v in each], dtype=np.float64) for side in ("base", "tuned"))
            if np.isfinite(base).all() and np.isfinite(tuned).all():
                self.base[metric], self.tuned[metric] = base, tuned


def gains_of(metric: str, groups: Sequence[Group], values: Mapping[str, Values]) -> Gains:
    """Tuned minus base of all rows: by prompt if every row has the same number of prompts, else their means."""
    have = {label: v for label, v in values.items() if metric in v.whole}
    by_prompt = {v.base[metric].shape[1] if metric in v.base else 0 for v in have.values()}
    if len(by_prompt) == 1 and by_prompt != {0}:
        found = {label: v.tuned[metric] - v.base[metric] for label, v in have.items()}
    else:
        found = {label: v.whole[metric][1] - v.whole[metric][0] for label, v in have.items()}
    return _assemble(groups, values, found)


def _assemble(groups: Sequence[Group], values: Mapping[str, Values], found: Mapping[str, np.ndarray]) -> Gains:
    """Arrays (k, P) of some rows as the gains of a table; rows without one are nan."""
    labels = tuple(g.label for g in groups)
    seeds = tuple(sorted({r.seed for g in groups for r in g.records}))
    prompts = next((array.shape[1] for array in found.values()), 1)
    table = np.full((len(labels), len(seeds), prompts), np.nan)
    places = {seed: k for k, seed in enumerate(seeds)}
    for label, array in found.items():
        table[labels.index(label), [places[seed] for seed in values[label].seeds]] = array
    return Gains(labels, seeds, table, frozenset((g.label, r.seed) for g in groups for r in g.failed))


def held_out(groups: Sequence[Group], values: Mapping[str, Values]) -> Gains | None:
    """The mean over held-out judges of the gain, each in standard deviations of the base model between prompts.

    Judges differ in scale, and the base model's spread is the one scale that no method changes. None without
    judges that all rows have by prompt.
    """
    records = [r for g in groups for r in g.finished]
    judges = set.intersection(*({*r.judges} for r in records)) if records else set()
    done = {g.label: values[g.label] for g in groups if g.finished}
    judges = {j for j in judges if all(j in v.base for v in done.values())}
    widths = {v.base[j].shape[1] for v in done.values() for j in judges}
    spreads = {j: float(np.mean([v.base[j].mean(0).std(ddof=1) for v in done.values()])) for j in sorted(judges)}
    usable = [j for j, spread in spreads.items() if spread > 0]
    if not usable or len(widths) != 1 or widths == {1}:
        return None
    found = {
        label: np.mean([(v.tuned[j] - v.base[j]) / spreads[j] for j in usable], axis=0) for label, v in done.items()
    }
    return _assemble(groups, values, found)


def speaks(gains: Gains, over: Over) -> Over:
    """What an interval can speak of: where prompts are not known, seeds alone are drawn anew."""
    return over if gains.values.shape[2] > 1 else THESE


def median_of_studies(gains: Gains, label: str, metric: str, over: Over, failed: int) -> Interval | None:
    """The middle one of a row's results, of which those that failed are the worst; None where such a one is it."""
    results = [float(v) for v in gains.values[gains.algorithms.index(label)].mean(-1) if math.isfinite(v)]
    value = middle(results, failed, lower=plain_metric(metric) in LOWER)
    prompts = gains.values.shape[2]
    return None if value is None else Interval(value, None, None, speaks(gains, over), len(results), prompts, failed)


def retained_by_studies(values: Values, metric: str, failed: int) -> Interval | None:
    """Tuned over base of the middle result; None where that failed, or the base model has none."""
    base, tuned = values.whole[metric]
    if not (base > 0).all():
        return None
    value = middle((tuned / base)[:, 0].tolist(), failed)
    return None if value is None else Interval(value, None, None, THESE, len(base), 1, failed)


def middle(results: Sequence[float], failed: int, lower: bool = False) -> float | None:
    """The median of results with so many failed ones, which are the worst; None if it is one of those.

    lower: whether less is better.
    """
    worst = math.inf if lower else -math.inf
    everything = [*results, *[worst] * failed]
    value = float(np.median(everything)) if everything else math.nan
    return value if math.isfinite(value) else None


def retained(values: Values, metric: str, over: Over, failed: int) -> Interval | None:
    """Tuned over base; a ratio of means, with the interval of its linear part (the delta method)."""
    by_prompt = metric in values.base and values.base[metric].shape[1] > 1
    base, tuned = (values.base[metric], values.tuned[metric]) if by_prompt else values.whole[metric]
    mean = base.mean()
    if not mean > 0:
        return None
    ratio = tuned.mean() / mean
    linear = ratio + (tuned - ratio * base) / mean
    return interval(mean_squares(linear), over if by_prompt else THESE, LEVEL, failed)
