"""Records to tables with statistics: what holds of each method, who shares the first place, and what cannot be told.

A pure function of records; nobody types a score. docs/statistics.md says which intervals and tests, docs/leaderboard.md
what a table shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from flowbench.errors import UsageError
from flowbench.escape import plain
from flowbench.evaluation.statistics import (
    LIKE,
    THESE,
    Components,
    Gains,
    Interval,
    Over,
    Ranking,
    Reached,
    Standing,
    compare,
    mean_gain,
    smallest_difference,
)
from flowbench.evaluation.statistics.crossed import interval, mean_squares
from flowbench.record import Record
from flowbench.reporting.groups import TUNED, Group, Workload, group, mixtures
from flowbench.reporting.style import family_of
from flowbench.reporting.targets import DIVERSITY, Target, Unit, cost
from flowbench.reporting.values import (
    LEVEL,
    Values,
    gains_of,
    held_out,
    median_of_studies,
    retained,
    retained_by_studies,
    speaks,
)
from flowbench.terms import plain_metric, trained_metrics

TRUTH, EXACT = "oracle_exact", "reward"
HELD_OUT = "held-out"  # the mean of the held-out judges' gains, each in deviations of the base model over prompts
LAST = ("oracle_exact", "oracle_soft", "diversity", "w2", "kl")  # columns, in this order, behind all others


@dataclass(frozen=True)
class Row:
    """One method, with one setting, on one workload.

    gains: tuned minus base by metric, and "held-out", means over runs, or under ruleset "tuned" the median of the
    studies, without an interval; retained: diversities as a share of the base model's, None where
    that has none; broken: metrics that are not finite in so many runs; standing: its place among the rows, None without
    a finished run. seconds, evaluations, reward_calls: means over finished runs. to_target: costs by unit.
    """

    group: Group
    family: str
    gains: Mapping[str, Interval]
    retained: Mapping[str, Interval | None]
    broken: Mapping[str, int]
    standing: Standing | None
    images: int
    seconds: float
    evaluations: float
    reward_calls: float
    to_target: Mapping[Unit, Reached] = field(default_factory=dict)

    @property
    def algorithm(self) -> str:
        """The algorithm's name."""
        return self.group.algorithm

    @property
    def label(self) -> str:
        """The row's name, unique in its table."""
        return self.group.label

    @property
    def seeds(self) -> int:
        """Finished runs."""
        return len(self.group.finished)

    @property
    def failed(self) -> int:
        """Runs that gave no result."""
        return len(self.group.failed)


@dataclass(frozen=True, eq=False)
class Table:
    """All methods on one workload, in the order of the metric `by`.

    metrics: columns of numbers, those trained on first; gains: what their statistics are computed from; ranking: of
    `by`; smallest: the difference in `by` that so many seeds and prompts show with probability 0.8 after correction,
    None where that cannot be said; warnings: what makes its rows less comparable.
    """

    workload: Workload
    split: str
    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    trained: frozenset[str]
    by: str | None
    over: Over
    gains: Mapping[str, Gains]
    ranking: Ranking | None
    smallest: float | None
    target: Target | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Board:
    """A table for each workload; notes: what a reader should know of all."""

    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()


def board(
    records: Iterable[Record],
    split: str = "test",
    over: Over = LIKE,
    by: str | None = None,
    target: Target | None = None,
) -> Board:
    """The tables of some records.

    over: whether intervals speak of prompts like these or of these prompts; by: the metric that orders the rows, by
    default the truth where it is known, else the reward trained on.
    Raises UsageError when no record has the split, no table has the metric, or the rules of a ruleset are broken.
    """
    grouped = group(records, split)
    tables = tuple(_table(w, groups, split, over, by, target) for w, groups in grouped.workloads.items())
    if by is not None and all(table.by is None for table in tables):
        known = sorted({metric for table in tables for metric in table.metrics})
        raise UsageError(f"no record has the metric '{plain(by)}'; there are: {', '.join(map(plain, known)) or 'none'}")
    return Board(tables, grouped.notes)


def _table(
    workload: Workload, groups: Sequence[Group], split: str, over: Over, by: str | None, target: Target | None
) -> Table:
    values = {g.label: Values(g, split) for g in groups}
    metrics = _ordered({m: None for v in values.values() for m in v.metrics}, workload.reward)
    gains = {m: gains_of(m, groups, values) for m in metrics}
    judged = held_out(groups, values)
    if judged is not None:
        gains[HELD_OUT] = judged
    order = by if by in gains else _default_order(gains, workload.reward) if by is None else None
    ranking = compare(gains[order], speaks(gains[order], over)) if order else None
    standings = {s.algorithm: s for s in ranking.standings} if ranking else {}
    tuned = workload.ruleset == TUNED
    rows = [_row(g, values[g.label], gains, over, standings.get(g.label), target, tuned) for g in groups]
    places = {label: k for k, label in enumerate(standings)}

    def place(row: Row) -> tuple[float, str]:
        if not tuned:
            return places.get(row.label, len(places)), row.label
        return (-row.gains[order].value if order and order in row.gains else math.inf), row.label

    return Table(
        workload=workload,
        split=split,
        rows=tuple(sorted(rows, key=place)),
        metrics=(*metrics, *([HELD_OUT] if judged is not None else [])),
        trained=_trained(workload.reward),
        by=order,
        over=over,
        gains=gains,
        ranking=ranking,
        smallest=_smallest(gains[order], speaks(gains[order], over)) if order else None,
        target=target,
        warnings=tuple(mixtures(r for g in groups for r in g.finished)),
    )


def _row(
    one: Group,
    values: Values,
    gains: Mapping[str, Gains],
    over: Over,
    standing: Standing | None,
    target: Target | None,
    tuned: bool,
) -> Row:
    label, done = one.label, one.finished
    mine = {m: g for m, g in gains.items() if np.isfinite(g.values[g.algorithms.index(label)]).any()}
    spent = [(r.budget.seconds, r.budget.function_evaluations, r.budget.reward_calls) for r in done]
    seconds, evaluations, calls = np.mean(spent, axis=0) if spent else (math.nan, math.nan, math.nan)
    units: tuple[Unit, ...] = ("images", "seconds")
    failed, shares = len(one.failed), [m for m in values.whole if plain_metric(m) == DIVERSITY]
    if tuned:
        medians = {m: median_of_studies(g, label, m, over, failed) for m, g in mine.items()}
        scores = {m: median for m, median in medians.items() if median is not None}
        kept = {m: retained_by_studies(values, m, failed) for m in shares}
    else:
        scores = {m: mean_gain(g, label, speaks(g, over)) for m, g in mine.items()}
        kept = {m: retained(values, m, over, failed) for m in shares}
    return Row(
        group=one,
        family=family_of(one.algorithm),
        gains=scores,
        retained=kept,
        broken=values.broken,
        standing=standing,
        images=round(np.mean([r.budget.images for r in one.records])),
        seconds=float(seconds),
        evaluations=float(evaluations),
        reward_calls=float(calls),
        to_target={unit: found for unit in units if target and (found := cost(one, target, unit))},
    )


def over_seeds(numbers: Sequence[float]) -> Interval:
    """The mean of one value per seed, with Student's t interval over seeds; none for a single seed."""
    return interval(mean_squares(np.array(numbers, dtype=np.float64)[:, None]), THESE, LEVEL)


def _smallest(gains: Gains, over: Over) -> float | None:
    """The smallest difference of two methods that a table like this one shows; None with a single seed or method."""
    finished = [a for a in gains.algorithms if np.isfinite(gains.paired(a, a)).any()]
    pairs = [gains.paired(a, b) for a, b in combinations(finished, 2)]
    squares = [mean_squares(a - b) for a, b in pairs if a.shape[0] > 1]
    if not squares:
        return None
    prompts = gains.values.shape[2]
    seeds = round(float(np.median([ms.seeds for ms in squares])))
    by_seed = float(np.mean([ms.by_seed for ms in squares]))
    if prompts == 1:
        return _finite(smallest_difference(Components(0, math.sqrt(by_seed), 0), seeds, 1, over, methods=len(finished)))
    residual, by_prompt = (float(np.mean([getattr(ms, name) for ms in squares])) for name in ("residual", "by_prompt"))
    between_prompts, between_seeds = max(by_prompt - residual, 0) / seeds, max(by_seed - residual, 0) / prompts
    found = Components(math.sqrt(between_prompts), math.sqrt(between_seeds), math.sqrt(residual))
    return _finite(smallest_difference(found, seeds, prompts, over, methods=len(finished)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _trained(reward: str) -> frozenset[str]:
    """Metrics that a run on this reward trains on; a name that cannot be read, of a foreign record, is itself."""
    try:
        return trained_metrics(reward) | {EXACT}
    except UsageError:
        return frozenset({reward})


def _default_order(gains: Mapping[str, Gains], reward: str) -> str | None:
    return next((m for m in (TRUTH, EXACT, *sorted(_trained(reward))) if m in gains), None)


def _ordered(metrics: Iterable[str], reward: str) -> tuple[str, ...]:
    """Those trained on first, then the judges, truth, diversity and divergence."""
    trained, places = _trained(reward), {name: k for k, name in enumerate(LAST)}

    def place(metric: str) -> tuple[int, int, str]:
        name = plain_metric(metric)
        return (places.get(name, -1) + 1, name not in trained, metric)

    return tuple(sorted(metrics, key=place))
