"""What runs cost until they reached a target, from the points of their budgets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from flowbench.evaluation.statistics import Reached, Trajectory, reached
from flowbench.evaluation.statistics.targets import FLOOR
from flowbench.record import Record
from flowbench.reporting.groups import Group

DIVERSITY = "diversity"
Unit: TypeAlias = Literal["images", "seconds"]


@dataclass(frozen=True)
class Target:
    """A score on `dev` that counts as reached while diversity is at least `floor` of the base model's."""

    metric: str
    value: float
    floor: float = FLOOR


def trajectory(record: Record, target: Target, unit: Unit) -> Trajectory | None:
    """A run at the points of its budget at which it was scored on `dev`; None if none has the target's metric."""
    points = [p for p in record.points if target.metric in p.scores]
    if not points or target.metric not in record.dev_base:
        return None
    base = record.dev_base.get(DIVERSITY, math.nan)
    kept = [p.scores.get(DIVERSITY, math.nan) / base if base > 0 else math.nan for p in points]
    try:
        return Trajectory(
            cost=tuple(float(getattr(p, unit)) for p in points),
            value=tuple(p.scores[target.metric] for p in points),
            kept=tuple(kept),
            base=record.dev_base[target.metric],
            finished=record.status == "finished",
        )
    except ValueError:
        return None


def cost(one: Group, target: Target, unit: Unit) -> Reached | None:
    """The costs of a row's runs; None where no finished run was scored on the way."""
    runs = [trajectory(r, target, unit) for r in one.finished]
    there = [run for run in runs if run is not None]
    return reached(there, target.value, len(one.failed), target.floor) if there else None
