"""Raw rewards to a well-scaled learning signal, and advantages to weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

    @property
    def centers(self) -> bool:
        """Whether shaped rewards have the mean over the prompt's images taken out."""
        return self.kind in ("center", "normalize", "squash")

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


Weighting: TypeAlias = Literal["exp", "softplus", "sigmoid", "linear", "topk"]

# Weights (R,) of advantages (R,) at a temperature tau; "topk" is 1 for the better half of the rows. None ever falls.
WEIGHTS: Mapping[Weighting, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "exp": lambda a, tau: torch.exp(tau * a),
    "softplus": lambda a, tau: torch.nn.functional.softplus(tau * a),
    "sigmoid": lambda a, tau: torch.sigmoid(tau * a),
    "linear": lambda a, tau: tau * a,
    "topk": lambda a, tau: (a >= a.median()).float(),
}


def clipped(advantage: torch.Tensor, bound: float | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The advantages (R,) within +-bound, and how large a share was outside; as they are where bound is None."""
    if bound is None:
        return advantage, {}
    return advantage.clamp(-bound, bound), {"clipped": (advantage.abs() > bound).float().mean()}


def effective_sample_size(w: torch.Tensor) -> torch.Tensor:
    """(sum |w|)^2 / (R sum w^2) of weights (R,): 1 where all rows count alike, 1 / R where one alone does."""
    return w.abs().sum() ** 2 / (len(w) * w.square().sum().clamp_min(1e-12))
