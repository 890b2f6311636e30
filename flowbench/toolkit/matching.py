"""What algorithms share that regress velocities on images noised again: the states, how many, and which noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import Field

from flowbench.algorithm import Algorithm, AlgorithmConfig
from flowbench.models.flow import interpolate
from flowbench.models.policy import Policy
from flowbench.rollout import Batch, Draws, Rollout, endpoints


@dataclass(frozen=True)
class Renoised:
    """x_sigma (R, C, h, w) on the straight path between x0 and noise, sigma (R,), and its target velocity u."""

    x: torch.Tensor
    sigma: torch.Tensor
    u: torch.Tensor


def renoised(batch: Batch, x0: torch.Tensor | None = None) -> Renoised:
    """The rows' images, or other latents x0 (R, C, h, w), mixed with the noise and at the sigma that each row has."""
    eps, sigma = batch.draw()
    x0 = batch.x0 if x0 is None else x0
    return Renoised(interpolate(x0, eps, sigma), sigma, eps - x0)


def state_of(batch: Batch) -> Renoised:
    """The state that a row has, of rows made by `visited`, with the velocity that leads straight to its x0; else
    `renoised`."""
    if batch.x is None:
        return renoised(batch)
    x, sigma = batch.state()
    return Renoised(x, sigma, (x - batch.x0) / sigma[:, None, None, None])


class MatchingConfig(AlgorithmConfig):
    """Hyperparameters of every algorithm of this kind."""

    states_per_image: int = Field(1, ge=1, description="noisy states per image and pass")


M = TypeVar("M", bound=MatchingConfig)


class Matching(Algorithm[M]):
    """Base class: rows are images, each with a fresh noisy state per pass. Subclasses define prepare and loss."""

    def rows(self, rollout: Rollout, advantage: torch.Tensor) -> Batch:
        """`states_per_image` rows per image: all images, and all of them again."""
        return endpoints(rollout, advantage, copies=self.cfg.states_per_image)

    def draws(self) -> Draws:
        """One noisy state per row."""
        return Draws(noises=1, sigma=True)


class TrailingMatching(Matching[M]):
    """Base class for those with a weight view that follows the trained weights ever more slowly."""

    def setup(self, policy: Policy) -> None:
        """Count iterations from 0."""
        super().setup(policy)
        self.iterations = 0

    def trail(self, policy: Policy, view: str, ramp: float, largest: float, start: int = 0) -> None:
        """Once per iteration: move the view with the decay min(largest, ramp max(0, iterations - start))."""
        self.iterations += 1
        policy.update_view(view, decay=min(largest, ramp * max(0, self.iterations - start)))

    def state_dict(self) -> dict[str, Any]:
        """How many iterations there were."""
        return {"iterations": self.iterations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.iterations = state["iterations"]
