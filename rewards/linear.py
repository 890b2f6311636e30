"""A linear reward of points, for the analytic models."""

from __future__ import annotations

from typing import Any

import torch

from flowbench.reward import register_reward
from flowbench.scoring.points import PointReward
from flowbench.testbeds.plane.density import QuadraticForm


@register_reward(
    "linear",
    source="flowbench analytic testbed (docs/analytic.md)",
    licence="Apache-2.0",
    range=(float("-inf"), float("inf")),
    differentiable=True,
    domain="points",
    reads_prompt=False,
)
class Linear(PointReward):
    """r = direction . x + offset, for analytic models; the optimum at beta moves their mean by S direction / beta."""

    pure = True

    def __init__(self, direction: list[float], offset: float = 0.0) -> None:
        self.direction, self.offset = direction, offset

    def form(self) -> QuadraticForm:
        c = torch.tensor(self.direction, dtype=torch.float64)
        return QuadraticForm(c, torch.zeros(len(c), len(c), dtype=torch.float64), self.offset)

    def provenance(self) -> dict[str, Any]:
        return {"direction": self.direction, "offset": self.offset}
