"""Critics of intermediate states: their contract, a light network V(x_sigma, sigma, c), and what a value explains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flowbench.algorithm import RewardFunction
from flowbench.models.policy import Policy
from flowbench.models.processes import ALONE, Processes
from flowbench.rollout import Batch, Conditioning, centered_within
from flowbench.toolkit.matching import state_of


@dataclass(frozen=True)
class Sight:
    """What a critic is shown of R rows: states, texts, and the target r_s that it may learn from once it has judged.

    x (R, C, h, w), sigma (R,), target (R,), group (R,). There is no x0 and no noise: from them and x the critic could
    tell what it is asked to foresee.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    cond: Conditioning
    prompts: tuple[str, ...]
    target: torch.Tensor
    group: torch.Tensor


def sight(batch: Batch) -> Sight:
    """The batch's rows as a critic sees them; their `advantage` is its target."""
    assert batch.group is not None
    state = state_of(batch)
    return Sight(state.x.detach(), state.sigma, batch.cond, batch.prompts, batch.advantage, batch.group)


class Critic:
    """Base class, and the critic that is none: V = 0.

    A row is judged in two steps, as an algorithm measures and compares: `measure` gives one scalar of each state,
    `judge` makes V of those of a whole minibatch. Then the critic learns: by the gradient of `trained`, if it has a
    `network`, else in `learn`.
    """

    network: nn.Module | None = None

    def measure(self, policy: Policy, rows: Sight, score: RewardFunction) -> torch.Tensor:
        """One scalar (R,) of each state, a function of its row alone; score: the run's reward. Without gradient."""
        return torch.zeros_like(rows.target)

    def judge(self, measured: torch.Tensor, sigma: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """V (R,) of a whole minibatch, from what was measured, sigma (R,) and group (R,)."""
        return measured

    def trained(self, policy: Policy, rows: Sight, judged: torch.Tensor | None) -> torch.Tensor:
        """The value (R,) whose error is the critic's loss; judged: what `judge` gave, where that came before.

        With a gradient for the network. Without one it is a leaf that reaches nothing.
        """
        value = torch.zeros_like(rows.target) if judged is None else judged.detach().clone()
        return value.requires_grad_()

    def learn(self, processes: Processes = ALONE) -> None:
        """After an iteration: learn from the rows that were measured in it, in all processes."""

    def state_dict(self) -> dict[str, Any]:
        """All that was learned beside the network."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class NetworkCritic(Critic):
    """V of a `StateCritic`, from x_sigma, sigma and a summary of the text."""

    def __init__(self, policy: Policy, width: int) -> None:
        torch.manual_seed(0)
        channels, *sides = policy.latent_shape
        self.network: StateCritic = StateCritic(channels, policy.text_width, width, min(sides))

    def measure(self, policy: Policy, rows: Sight, score: RewardFunction) -> torch.Tensor:
        """V (R,)."""
        return self.trained(policy, rows, None)

    def trained(self, policy: Policy, rows: Sight, judged: torch.Tensor | None) -> torch.Tensor:
        """V (R,)."""
        value: torch.Tensor = self.network(rows.x, rows.sigma, policy.text_summary(rows.cond))
        return value


class StateCritic(nn.Module):
    """Predicts the terminal reward from a noisy latent: two convolutions, the text as a gain on their channels, an MLP.

    Inputs x (R, C, h, w) with h and w at least `side`, sigma (R,) in [0, 1], text summary (R, D); output (R,).
    """

    frequency: torch.Tensor

    def __init__(self, channels: int, text_width: int, width: int = 64, side: int = 8) -> None:
        super().__init__()
        pooled = min(side, 8)
        cells = (pooled + 1) // 2  # per axis, after the second convolution
        self.text = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width), nn.SiLU())
        self.noise = nn.Sequential(nn.Linear(16, width), nn.SiLU())
        self.conv = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(pooled),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
        )
        self.gain = nn.Linear(2 * width, 2 * width)
        last = nn.Linear(2 * width, 1)
        self.head = nn.Sequential(
            nn.Linear(width * cells * cells + 2 * width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.SiLU(),
            last,
        )
        # Start from V = 0: an untrained critic leaves the shaped reward as it is.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.register_buffer("frequency", math.pi * 2.0 ** torch.arange(8), persistent=False)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        """V(x_sigma, sigma, c), (R,)."""
        dtype = self.frequency.dtype
        phase = sigma.to(dtype)[:, None] * self.frequency
        condition = torch.cat([self.text(summary.to(dtype)), self.noise(torch.cat([phase.sin(), phase.cos()], 1))], 1)
        scale, shift = self.gain(condition)[:, :, None, None].chunk(2, dim=1)
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        features = torch.nn.functional.silu(self.conv(x) * (1 + scale) + shift).flatten(1)
        value: torch.Tensor = self.head(torch.cat([features, condition], 1))[:, 0]
        return value


def explained_variance(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - Var(target - value) / Var(target): 1 is perfect, 0 is as good as the mean, negative is worse."""
    return 1 - (target - value).var() / target.var().clamp_min(1e-12)


RANGES = (0.0, 0.33, 0.66, 0.85, 1.01)  # of sigma: each from one value to below the next
FEWEST = 8  # rows; of fewer the explained variance says nothing


def explained_by_sigma(value: torch.Tensor, target: torch.Tensor, sigma: torch.Tensor) -> dict[str, torch.Tensor]:
    """Explained variance (a scalar each) of the rows in four ranges of sigma, named by where a range begins."""
    return {
        f"explained_variance_{low}": explained_variance(value[rows], target[rows])
        for low, rows in _ranges(sigma)
        if rows.sum() >= FEWEST
    }


def errors_within_prompts(
    values: Mapping[str, torch.Tensor], target: torch.Tensor, sigma: torch.Tensor, group: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Mean squares by range of sigma, each quantity with the mean over rows of the same group (R,) taken out.

    "within_prompt_variance_0.33" is that of the target (R,), "within_prompt_error_NAME_0.33" that of the target minus a
    named value (R,). What a value explains over many minibatches is 1 - the mean error over the mean variance; the mean
    of each minibatch's own quotient would be too low.
    """
    target, errors = centered_within(target, group), dict[str, torch.Tensor]()
    for low, rows in _ranges(sigma):
        errors[f"within_prompt_variance_{low}"] = target[rows].square().mean()
        for name, value in values.items():
            error = target - centered_within(value, group)
            errors[f"within_prompt_error_{name}_{low}"] = error[rows].square().mean()
    return errors


def _ranges(sigma: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The beginning of each range of sigma that has rows, and which rows."""
    for low, high in itertools.pairwise(RANGES):
        rows = (sigma >= low) & (sigma < high)
        if rows.any():
            yield f"{low:.2f}", rows
