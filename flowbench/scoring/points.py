"""Base of the rewards of points in the plane: a quadratic form, so that the optimum is known."""

from __future__ import annotations

import torch

from flowbench.reward import Reward
from flowbench.testbeds.plane.density import QuadraticForm


class PointReward(Reward):
    """Scores points (B, D, 1, 1) by the quadratic form that `form` gives; differentiable, and blind to prompts."""

    def form(self) -> QuadraticForm:
        """r(x) as a quadratic form."""
        raise NotImplementedError

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """Rewards (B,) of points (B, D, 1, 1)."""
        return self.form()(images.flatten(1))
