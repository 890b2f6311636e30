"""A quadratic reward of points, for the analytic models."""

from __future__ import annotations

from typing import Any

import torch

from flowbench.reward import register_reward
from flowbench.scoring.points import PointReward
from flowbench.testbeds.plane.density import QuadraticForm


@register_reward(
    "quadratic",
    source="flowbench analytic testbed (docs/analytic.md)",
    licence="Apache-2.0",
    range=(float("-inf"), 0.0),
    differentiable=True,
    domain="points",
    reads_prompt=False,
)
class Quadratic(PointReward):
    """r = -(x - target)' precision (x - target) / 2, for analytic models; the optimum also narrows their covariance."""

    pure = True

    def __init__(self, target: list[float], precision: list[list[float]]) -> None:
        self.target, self.precision = target, precision

    def form(self) -> QuadraticForm:
        y = torch.tensor(self.target, dtype=torch.float64)
        q = torch.tensor(self.precision, dtype=torch.float64)
        return QuadraticForm(q @ y, q, -(y @ q @ y).item() / 2)

    def provenance(self) -> dict[str, Any]:
        return {"target": self.target, "precision": self.precision}
