"""What judges are worth: how they order tuned checkpoints beside the truth, from the points of records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flowbench.evaluation.statistics import RankCorrelation, rank_correlation
from flowbench.reporting.audit.optimisation import Run, mean_ranks, proxy_of, runs_of
from flowbench.reporting.leaderboard import TRUTH, Table

MEAN = "mean of the held-out judges"


@dataclass(frozen=True)
class Judge:
    """One judge of a table. trained: whether the runs were trained on it, so that it is none."""

    name: str
    trained: bool
    correlation: RankCorrelation


def judges(table: Table) -> tuple[Judge, ...]:
    """Kendall's tau of every judge, of their mean rank and of the reward trained on with the truth, best first.

    Over the points of all finished runs on split `dev`, the base model left out. Runs of one method resemble each
    other, so that the interval is over methods (it needs three). Empty where the truth is not known, or trained on.
    """
    if TRUTH in table.trained:
        return ()
    runs = [(row.label, run) for row in table.rows for run in runs_of(row.group) if TRUTH in run.gains]
    if not runs:
        return ()
    held = set.intersection(*({*r.judges} for row in table.rows for r in row.group.finished))
    names = [name for name in sorted(held) if all(name in run.gains for _, run in runs)]
    proxy = proxy_of(table.workload.reward, runs[0][1].gains)
    scores = {name: _points(runs, name) for name in names}
    if len(names) > 1:
        scores[MEAN] = mean_ranks(list(scores.values()))
    if proxy is not None and all(proxy in run.gains for _, run in runs):
        scores[proxy] = _points(runs, proxy)
    found = _correlations(scores, runs)
    made = (Judge(name, name == proxy, tau) for name, tau in found.items() if math.isfinite(tau.value))
    return tuple(sorted(made, key=lambda judge: -judge.correlation.value))


def _points(runs: Sequence[tuple[str, Run]], metric: str) -> np.ndarray:
    return np.concatenate([run.gains[metric][1:] for _, run in runs])


def _correlations(scores: Mapping[str, np.ndarray], runs: Sequence[tuple[str, Run]]) -> dict[str, RankCorrelation]:
    truth = _points(runs, TRUTH)
    methods = np.concatenate([np.repeat(label, len(run.images) - 1) for label, run in runs])
    return {name: rank_correlation(values, truth, methods) for name, values in scores.items()}
