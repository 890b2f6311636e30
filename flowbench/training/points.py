"""Scores on split `dev` at points of the budget, kept in a file of their own as they are computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from flowbench.evaluation.dev import DevScorer
from flowbench.files import write_atomically
from flowbench.models.counting import DEV
from flowbench.models.policy import Policy
from flowbench.record import Point
from flowbench.training.budget import Budget

POINTS = "points.jsonl"


class MeasuredPoint(Point):
    """A line of points.jsonl: a point, and what measuring it cost. At iteration 0 it is the base model's."""

    dev_seconds: float
    dev_function_evaluations: int

    @property
    def plain(self) -> Point:
        """As it stands in a record."""
        return Point.model_validate(self.model_dump(include=set(Point.model_fields)))


class Points:
    """The points of a run: where they are, which are measured, and what they say.

    iterations: of the whole run; count: how many points, of which the last is at the end. Each is measured once: an
    interrupted run reads those that it has. Of several processes all measure, and main writes.
    """

    def __init__(
        self,
        scorer: DevScorer,
        policy: Policy,
        count: int,
        iterations: int,
        folder: Path,
        on_point: Callable[[Point], None] = lambda point: None,
    ) -> None:
        self.scorer, self.policy, self.path, self.on_point = scorer, policy, folder / POINTS, on_point
        self.last = iterations
        self.planned = {0, *(max(1, round(iterations * k / count)) for k in range(1, count + 1))}
        self.measured: list[MeasuredPoint] = []

    def resume(self, iteration: int) -> None:
        """Take the points that the folder has, up to this iteration."""
        self.measured = [point for point in read_points(self.path) if point.iteration <= iteration]
        if self.path.is_file():
            self._write()

    def due(self, iteration: int) -> bool:
        """Whether a point is to be measured after this iteration; 0 is the base model, whenever it is."""
        return iteration in self.planned and all(point.iteration != iteration for point in self.measured)

    def measure(self, iteration: int, budget: Budget) -> None:
        """Score the weights in use, or for iteration 0 the base model; they are left as they are."""
        begun, evaluations = time.perf_counter(), self.policy.evaluations
        mark = evaluations.mark()
        with evaluations.counted_as(DEV):
            scores = self.scorer.current() if iteration else self.scorer.base()
        (spent,) = self.policy.processes.total((evaluations.counts.get(DEV, 0),))
        evaluations.back(mark)
        budget = budget if iteration else Budget()
        point = MeasuredPoint(
            images=budget.images,
            iteration=iteration,
            seconds=budget.seconds,
            function_evaluations=budget.function_evaluations,
            scores=scores.means,
            per_prompt=scores.per_prompt if iteration == self.last else {},
            dev_seconds=time.perf_counter() - begun,
            dev_function_evaluations=spent,
        )
        self.measured = sorted([*self.measured, point], key=lambda p: p.iteration)
        self._write()
        self.on_point(point.plain)

    def _write(self) -> None:
        if self.policy.processes.is_main:
            write_atomically(self.path, "".join(f"{p.model_dump_json()}\n" for p in self.measured))

    @property
    def base(self) -> dict[str, float]:
        """The base model's scores."""
        return next((point.scores for point in self.measured if not point.iteration), {})

    @property
    def reached(self) -> tuple[Point, ...]:
        """The points of training, in order."""
        return tuple(point.plain for point in self.measured if point.iteration)

    @property
    def seconds(self) -> float:
        """What all of them took."""
        return sum(point.dev_seconds for point in self.measured)

    @property
    def function_evaluations(self) -> int:
        """Velocities that all of them took."""
        return sum(point.dev_function_evaluations for point in self.measured)


def read_points(path: Path) -> list[MeasuredPoint]:
    """The lines of a points.jsonl, up to the first that is none; none where there is no file."""
    found: list[MeasuredPoint] = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            found.append(MeasuredPoint.model_validate_json(line))
        except ValidationError:
            break
    return found
