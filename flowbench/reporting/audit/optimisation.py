"""Over-optimisation: the truth beside the reward trained on, over training, from the points of records.

All scores are on split `dev`, tuned minus base; a run begins at the base model, with the gains 0. Whatever is chosen (a
point of the budget) is chosen by other numbers than it is judged by: the best of several noisy points, judged by
itself, is always too good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flowbench.evaluation.statistics import Interval
from flowbench.record import Record
from flowbench.reporting.groups import Group
from flowbench.reporting.leaderboard import EXACT, TRUTH, Table, over_seeds
from flowbench.reporting.targets import DIVERSITY
from flowbench.terms import path_name, trained_metrics

DISTANCES = ("w2", "kl")


@dataclass(frozen=True)
class Run:
    """One run at T + 1 points, the base model's among them: images, and gains (T + 1,) by metric; diversity is a share.

    A metric that some point lacks, or that is no finite number there, is not in it.
    """

    seed: int
    images: np.ndarray
    gains: dict[str, np.ndarray]


@dataclass(frozen=True)
class Step:
    """The mean over seeds at one point of the budget; each None where it is not known."""

    images: int
    proxy: Interval | None
    truth: Interval | None
    distance: Interval | None
    diversity: Interval | None


@dataclass(frozen=True)
class Path:
    """One method over training.

    peak: images at which a run's truth is largest, the mean over seeds. lost: truth at the point where the *other*
    seeds' mean is largest, minus truth at the end, None for one seed; above 0 the truth fell while training went on.
    kept: truth at the point that the held-out judges prefer, minus truth at the end; None without judges on dev.
    """

    label: str
    algorithm: str
    seeds: int
    steps: tuple[Step, ...]
    peak: Interval | None
    lost: Interval | None
    kept: Interval | None

    @property
    def end(self) -> Step:
        """The end of the budget."""
        return self.steps[-1]

    @property
    def over_optimised(self) -> bool:
        """Whether the truth has fallen from where it was, beyond the noise of seeds."""
        return self.lost is not None and self.lost.low is not None and self.lost.low > 0


def paths(table: Table) -> tuple[Path, ...]:
    """The methods of a table over training, in its order; none where the truth is not known, or is the reward itself.

    A method is there if its finished runs were scored at the same points.
    """
    if TRUTH in table.trained:
        return ()
    found = (_path(row.group, table.workload.reward) for row in table.rows)
    return tuple(path for path in found if path is not None)


def runs_of(group: Group) -> list[Run]:
    """The finished runs of a row that were scored on the way, if all were at the same points; else none."""
    there = [r for r in group.finished if r.points and r.dev_base]
    if len({tuple(p.images for p in r.points) for r in there}) != 1:
        return []
    return [run_of(r) for r in there]


def run_of(record: Record) -> Run:
    """A record's points as gains."""
    images = np.array([0, *(p.images for p in record.points)])
    gains = {}
    for metric, base in record.dev_base.items():
        values = [point.scores.get(metric, math.nan) for point in record.points]
        curve = np.array([base, *values], dtype=np.float64)
        share = metric == DIVERSITY
        gain = curve - base if not share else curve / base if base > 0 else np.full_like(curve, np.nan)
        if np.isfinite(gain).all():
            gains[metric] = gain
    return Run(record.seed, images, gains)


def proxy_of(reward: str, gains: dict[str, np.ndarray]) -> str | None:
    """The name under which points have the reward trained on."""
    return next((m for m in (EXACT, path_name(reward), *sorted(trained_metrics(reward))) if m in gains), None)


def _path(group: Group, reward: str) -> Path | None:
    runs = [run for run in runs_of(group) if TRUTH in run.gains]
    if not runs:
        return None
    proxy = proxy_of(reward, runs[0].gains)
    distance = next((d for d in DISTANCES if all(d in run.gains for run in runs)), None)
    truth = np.stack([run.gains[TRUTH] for run in runs])  # (K, T + 1)
    judges = sorted(set.intersection(*({*r.judges} for r in group.finished)))
    steps = tuple(
        Step(
            images=int(images),
            proxy=_mean(runs, proxy, t),
            truth=_mean(runs, TRUTH, t),
            distance=_mean(runs, distance, t),
            diversity=_mean(runs, DIVERSITY, t),
        )
        for t, images in enumerate(runs[0].images)
    )
    return Path(
        label=group.label,
        algorithm=group.algorithm,
        seeds=len(runs),
        steps=steps,
        peak=_within(over_seeds(runs[0].images[truth.argmax(1)].tolist()), 0, float(runs[0].images[-1])),
        lost=over_seeds(_lost(truth)) if len(runs) > 1 else None,
        kept=_kept(runs, truth, judges),
    )


def _mean(runs: Sequence[Run], metric: str | None, t: int) -> Interval | None:
    if metric is None or any(metric not in run.gains for run in runs):
        return None
    return over_seeds([float(run.gains[metric][t]) for run in runs])


def _lost(truth: np.ndarray) -> list[float]:
    """Per seed the truth at the peak of the other seeds' mean, minus that at the end; truth (K, T + 1)."""
    everybody = truth.sum(0)
    return [float(own[(everybody - own).argmax()] - own[-1]) for own in truth]


def _kept(runs: Sequence[Run], truth: np.ndarray, judges: Sequence[str]) -> Interval | None:
    known = [j for j in judges if all(j in run.gains for run in runs)]
    if not known:
        return None
    chosen = [int(mean_ranks([run.gains[j] for j in known]).argmax()) for run in runs]
    return over_seeds([float(own[t] - own[-1]) for own, t in zip(truth, chosen, strict=True)])


def mean_ranks(scores: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over judges of the ranks (n,) that each gives to n checkpoints, 1 for the worst; ties share.

    Judges have scales of their own, which ranks do away with.
    """
    from scipy import stats

    return np.mean([stats.rankdata(values) for values in scores], axis=0)


def _within(found: Interval, low: float, high: float) -> Interval:
    """An interval of a quantity that has bounds."""
    if found.low is None or found.high is None:
        return found
    return replace(found, low=max(found.low, low), high=min(found.high, high))
