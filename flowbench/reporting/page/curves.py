"""What the points of the budget say: curves, targets, performance profiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from flowbench.evaluation.statistics import Reached, cost_to_target, performance_profile
from flowbench.record import Point, Record
from flowbench.reporting.groups import Group
from flowbench.reporting.leaderboard import Table, over_seeds
from flowbench.reporting.page import data
from flowbench.reporting.page.numbers import number, rounded
from flowbench.reporting.targets import DIVERSITY, Target, trajectory
from flowbench.terms import plain_metric

AXES: tuple[data.Axis, ...] = ("images", "evaluations", "seconds")
FACTORS = tuple(float(f) for f in np.geomspace(1, 8, 25))


def curve(one: Group) -> tuple[data.CurvePoint, ...]:
    """The mean over a row's finished runs at each point of the budget, with intervals over seeds."""
    runs = [r for r in one.finished if r.points and r.dev_base]
    longest = max((len(r.points) for r in runs), default=0)
    return tuple(_point([(r, r.points[k]) for r in runs if len(r.points) > k]) for k in range(longest))


def _point(there: Sequence[tuple[Record, Point]]) -> data.CurvePoint:
    metrics = dict.fromkeys(metric for r, point in there for metric in point.scores if metric in r.dev_base)
    scores = {}
    for metric in metrics:
        values = [v for r, point in there if (v := _score(r, point, metric)) is not None]
        if values:
            scores[metric] = number(over_seeds(values))
    return data.CurvePoint(
        images=rounded(float(np.mean([p.images for _, p in there]))),
        evaluations=rounded(float(np.mean([p.function_evaluations for _, p in there]))),
        seconds=rounded(float(np.mean([p.seconds for _, p in there]))),
        scores=scores,
    )


def _score(record: Record, point: Point, metric: str) -> float | None:
    """Tuned minus base; a diversity as a share of the base model's. None where that is no finite number."""
    value, base = point.scores.get(metric, math.nan), record.dev_base.get(metric, math.nan)
    share = plain_metric(metric) == DIVERSITY
    result = value - base if not share else value / base if base > 0 else math.nan
    return result if math.isfinite(result) else None


def goal(table: Table, truth: str | None, fixed: data.Goal | None) -> data.Goal | None:
    """The workload's target, or half of the largest median gain that a method has at the end on `dev`; None if none."""
    if fixed is not None:
        return fixed
    metrics = [m for m in (truth, *sorted(table.trained)) if m is not None]
    for metric in metrics:
        gains = []
        for row in table.rows:
            ends = [_score(r, r.points[-1], metric) for r in row.group.finished if r.points]
            known = [end for end in ends if end is not None]
            if known:
                gains.append(float(np.median(known)))
        if gains:
            return data.Goal(metric=metric, gain=rounded(max(gains) / 2), fixed=False) if max(gains) > 0 else None
    return None


def reached(one: Group, target: data.Goal | None) -> dict[str, data.Reached]:
    """What a row's runs cost until the target, by axis; empty without a target or points."""
    found = {axis: _costs(one, target, axis) for axis in AXES} if target else {}
    return {
        axis: data.Reached(
            median=rounded(costs.median) if math.isfinite(costs.median) else None,
            arrived=round(costs.share * len(costs.costs)),
            runs=len(costs.costs),
        )
        for axis, costs in found.items()
        if costs is not None
    }


def _costs(one: Group, target: data.Goal, axis: data.Axis) -> Reached | None:
    costs, scored = [], False
    for record in one.finished:
        value = record.dev_base.get(target.metric, math.nan) + target.gain
        run = trajectory(record, Target(target.metric, value), "seconds" if axis == "seconds" else "images")
        scored |= run is not None
        if run is not None and axis == "evaluations":
            spent = [p.function_evaluations for p in record.points if target.metric in p.scores]
            images = [0.0, *run.cost]
            at = cost_to_target(run, value, target.diversity)
            # Evaluations are spent evenly between two points.
            costs.append(float(np.interp(at, images, [0, *spent])) if math.isfinite(at) else math.inf)
        elif run is not None:
            costs.append(cost_to_target(run, value, target.diversity))
    return Reached((*costs, *[math.inf] * len(one.failed))) if scored else None


def profile(workloads: Sequence[data.Workload], short: Sequence[str]) -> data.Profile | None:
    """Performance profiles in images over the workloads with a target; None with fewer than two such workloads."""
    there = [(w, name) for w, name in zip(workloads, short, strict=True) if any(row.reached for row in w.rows)]
    if len(there) < 2:
        return None
    labels = dict.fromkeys(row.label for w, _ in there for row in w.rows)
    costs = {label: [_median(w, label) for w, _ in there] for label in labels}
    found = performance_profile(costs, FACTORS)
    curves = tuple(
        data.Curve(label=label, shares=tuple(map(float, found.shares[k])), area=rounded(float(found.area[k])))
        for k, label in enumerate(found.methods)
    )
    return data.Profile(
        factors=tuple(rounded(f) for f in FACTORS), workloads=tuple(name for _, name in there), curves=curves
    )


def _median(workload: data.Workload, label: str) -> float:
    for row in workload.rows:
        if row.label == label and "images" in row.reached:
            median = row.reached["images"].median
            return math.inf if median is None else median
    return math.inf


def front(points: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """The labels whose pair of numbers no other surpasses in one without being below it in the other."""
    kept, best = [], -math.inf
    for label, (_, y) in sorted(points.items(), key=lambda item: (-item[1][0], -item[1][1])):
        if y > best:
            kept.append(label)
            best = y
    return tuple(kept)
