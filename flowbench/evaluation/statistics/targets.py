"""What a run cost until it reached a target, and performance profiles over workloads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FLOOR = 0.9  # of the base model's diversity, which the rules ask every result to keep


@dataclass(frozen=True)
class Trajectory:
    """A run at T points of its budget, in order.

    cost: images or seconds spent until each point, increasing, above 0; value: the score in which the target is
    stated; kept: diversity as a share of the base model's; base: the base model's score, which is the value at cost 0.
    A run that broke off has the points that it reached, and `finished` is false.
    Raises ValueError for lengths that differ, no point, and costs that do not increase.
    """

    cost: tuple[float, ...]
    value: tuple[float, ...]
    kept: tuple[float, ...]
    base: float
    finished: bool = True

    def __post_init__(self) -> None:
        if not len(self.cost) == len(self.value) == len(self.kept):
            raise ValueError("cost, value and kept have different lengths")
        if self.finished and not self.cost:
            raise ValueError("a finished run has at least one point")
        if any(b <= a for a, b in zip((0.0, *self.cost), self.cost, strict=False)):
            raise ValueError("costs must increase, from above 0")


@dataclass(frozen=True)
class Reached:
    """The cost to the target of one method's runs on a workload: infinity for a run that never got there or failed.

    median: over runs; infinite when half of them or more never got there.
    """

    costs: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over runs."""
        return float(np.median(self.costs))

    @property
    def share(self) -> float:
        """The share of runs that reached the target, in [0, 1]."""
        return sum(math.isfinite(cost) for cost in self.costs) / len(self.costs)


@dataclass(frozen=True, eq=False)
class Profile:
    """For each method the share of workloads on which it is within a factor of the cheapest one (A, T), by factor.

    area: the mean of a method's curve over log factor, in [0, 1]; 1 for a method that is cheapest everywhere.
    """

    methods: tuple[str, ...]
    factors: np.ndarray
    shares: np.ndarray
    area: np.ndarray


def cost_to_target(run: Trajectory, target: float, floor: float = FLOOR) -> float:
    """The cost at which a run reached the target and kept diversity; infinity if it never did.

    Reached means value >= target and kept >= floor at two consecutive points, or at the last one of a run that
    finished. The cost is that of the later of both crossings, interpolated linearly since the point before. A base
    model that is at the target already costs nothing.
    """
    met = [v >= target and k >= floor for v, k in zip(run.value, run.kept, strict=True)]
    for i, here in enumerate(met):
        at_end = i + 1 == len(met)
        if here and (run.finished if at_end else met[i + 1]):
            before, value, kept = (run.cost[i - 1], run.value[i - 1], run.kept[i - 1]) if i else (0.0, run.base, 1.0)
            part = max(_crossing(value, run.value[i], target), _crossing(kept, run.kept[i], floor))
            return before + part * (run.cost[i] - before)
    return math.inf


def reached(runs: Sequence[Trajectory], target: float, failed: int = 0, floor: float = FLOOR) -> Reached:
    """The costs of a method's runs; failed: how many more runs left no points.

    Raises ValueError when there is no run at all.
    """
    costs = (*(cost_to_target(run, target, floor) for run in runs), *[math.inf] * failed)
    if not costs:
        raise ValueError("a method has at least one run")
    return Reached(costs)


def performance_profile(costs: Mapping[str, Sequence[float]], factors: Sequence[float]) -> Profile:
    """The profile of methods, name to the cost on each of W workloads, at increasing factors from 1 on.

    A workload that no method solves counts against all of them (Dolan and More 2002, doi:10.1007/s101070100263; Dahl et
    al. 2023, arXiv:2306.07179, section 4.3, where the area is over the factor itself and not its logarithm).
    Raises ValueError for no method, numbers of workloads that differ or are 0, and factors that do not increase from 1.
    """
    if not costs or len({len(row) for row in costs.values()}) != 1 or not len(next(iter(costs.values()))):
        raise ValueError("every method has a cost, or infinity, on each workload")
    steps = np.asarray(factors, dtype=np.float64)
    if steps.ndim != 1 or len(steps) < 2 or steps[0] != 1 or (np.diff(steps) <= 0).any():
        raise ValueError("factors begin with 1 and increase")
    table = np.array(list(costs.values()), dtype=np.float64)  # (A, W)
    best = table.min(0)
    solved = np.isfinite(table)
    within = solved[..., None] & (table[..., None] <= best[:, None] * steps)  # (A, W, T)
    shares = within.mean(1)
    return Profile(tuple(costs), steps, shares, np.trapezoid(shares, np.log(steps), axis=-1) / np.log(steps[-1]))


def _crossing(before: float, here: float, line: float) -> float:
    """Where on the way from before to here, which is on or above the line, it is crossed: in [0, 1]."""
    if math.isnan(before):  # nothing is known of the way there
        return 1.0
    return 0.0 if before >= line else (line - before) / (here - before)
