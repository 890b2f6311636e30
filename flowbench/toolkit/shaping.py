"""Reward shaping: raw rewards to a well-scaled learning signal."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from flowbench.rollout import Rollout

Kind: TypeAlias = Literal["none", "center", "normalize", "squash", "standardize"]


class RewardShaping:
    """Shapes the rewards of a rollout.

    none: as they are. center: minus the mean over the prompt's images. normalize: also over the running standard
    deviation. squash: also tanh. standardize: minus the running mean over the running standard deviation of all
    prompts, which leaves the prompts' own levels to a critic.
    """

    def __init__(self, kind: Kind, momentum: float = 0.9) -> None:
        self.kind, self.momentum = kind, momentum
        self.running: dict[str, float] = {}

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        """The shaped rewards (B,); moves the running statistics."""
        r = rollout.reward
        if self.kind == "none":
            return r
        centered = r - self._average("mean", r.mean()) if self.kind == "standardize" else rollout.center(r)
        if self.kind == "center":
            return centered
        normalized = centered / (self._average("std", centered.std()) + 1e-6)
        return torch.tanh(normalized) if self.kind == "squash" else normalized

    def _average(self, name: str, value: torch.Tensor) -> float:
        new = value.item()
        self.running[name] = self.momentum * self.running.get(name, new) + (1 - self.momentum) * new
        return self.running[name]
