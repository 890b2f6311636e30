"""Policies small enough for closed forms: a free velocity at one noisy state, and a one-step Gaussian sampler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowbench.models.flow import SAMPLERS, Step, gaussian_log_prob
from flowbench.rollout import Batch, Conditioning, Rollout


def conditioning(n: int) -> Conditioning:
    return Conditioning({}, torch.zeros(n, dtype=torch.int64))


def make_rollout(x0: torch.Tensor, reward: torch.Tensor, group: torch.Tensor | None = None, **parts: Any) -> Rollout:
    """A rollout of these images; one prompt unless `group` says otherwise."""
    n = len(x0)
    group = torch.zeros(n, dtype=torch.int64) if group is None else group
    sigmas = parts.pop("sigmas", torch.linspace(1, 0, 5, dtype=x0.dtype))
    return Rollout(0, ("p",) * n, group, conditioning(n), sigmas, x0, x0, reward, **parts)


def make_rows(x0: torch.Tensor, advantage: torch.Tensor, **parts: Any) -> Batch:
    """One row per image."""
    return Batch(("p",) * len(x0), conditioning(len(x0)), x0, advantage, **parts)


class OneState:
    """Many images of 0 in one state: E[. | x] is the mean over rows, and the velocity there a free vector.

    u (R, 1, 1, D): the rows' noise, and so their target velocities; views: the velocity (D,) of each weight view.
    """

    def __init__(self, u: torch.Tensor, sigma: float = 0.4, **views: torch.Tensor) -> None:
        self.u, self.sigma, self.views = u, sigma, views
        self.updates: list[tuple[str, float]] = []

    def draw_noise(self, n: int, device: torch.device | None = None) -> torch.Tensor:
        return self.u.expand(n, *self.u.shape[1:])  # of images that are 0, so that u = eps

    def draw_sigmas(self, n: int) -> torch.Tensor:
        return torch.full((n,), self.sigma, dtype=self.u.dtype)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning, weights: str = "current"):
        return self.views[weights].expand_as(x)

    def add_view(self, name: str) -> None:
        self.updates.append((name, 0.0))

    def update_view(self, name: str, decay: float) -> None:
        self.updates.append((name, decay))


class OneStep:
    """A sampler of one step: N(mean, std^2 I), whose mean (D,) is the parameter; `reference` is where it started."""

    sampler = SAMPLERS["flow-sde"]
    latent_shape, text_width, num_steps = (1, 1, 3), 1, 1

    def __init__(self, mean: torch.Tensor, reference: torch.Tensor, std: float) -> None:
        self.mean, self.reference, self.std = mean, reference, torch.tensor(std, dtype=mean.dtype)

    def transition(self, x: torch.Tensor, sigma: Any, sigma_next: Any, cond: Any, weights: str = "current") -> Step:
        mean = self.mean if weights == "current" else self.reference
        return Step(mean.expand_as(x), self.std)

    def text_summary(self, cond: Conditioning) -> torch.Tensor:
        return torch.zeros(len(cond), 1)

    def rollout(self, noise: torch.Tensor, gain: torch.Tensor) -> Rollout:
        """Images mean + std noise (n, 1, 1, D), with the linear reward gain . x0."""
        with torch.no_grad():
            start = torch.zeros_like(noise)
            step = self.transition(start, 1.0, 0.0, None)
            x0 = step.mean + self.std * noise
            states, log_prob = torch.stack([start, x0], 1), gaussian_log_prob(x0, step)[:, None]
        sigmas = torch.tensor([1.0, 0.0], dtype=noise.dtype)
        reward = (x0 * gain).flatten(1).sum(1)
        return make_rollout(x0, reward, sigmas=sigmas, states=states, log_prob=log_prob)


@pytest.fixture
def toys() -> SimpleNamespace:
    """The classes and functions of this file."""
    names = (conditioning, make_rollout, make_rows, OneState, OneStep)
    return SimpleNamespace(**{part.__name__: part for part in names})


@pytest.fixture
def draw() -> Any:
    """Standard normal float64 tensors from one generator."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
