"""Weighted sums of rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flowbench.reward import Reward, checked_score
from flowbench.terms import Term, combined_info

if TYPE_CHECKING:
    from flowbench.scoring.checkpoints import Weights


@dataclass
class Moments:
    """Mean and variance of all values seen so far, updated by batches (Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def add(self, values: torch.Tensor) -> None:
        """Take in values (B,)."""
        values = values.detach().double().cpu()
        n, mean = len(values), values.mean().item()
        total, distance = self.count + n, mean - self.mean
        self.squares += (values - mean).square().sum().item() + distance**2 * self.count * n / total
        self.mean += distance * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Their standard deviation; 1 before the first values and for values that are all equal."""
        return math.sqrt(self.squares / self.count) if self.count and self.squares > 0 else 1.0


class WeightedSum(Reward):
    """sum_k w_k r_k, or sum_k w_k (r_k - mean_k) / std_k with each reward's own mean and deviation over the run.

    The statistics cover all images of training up to the present iteration; they are part of the checkpoint.
    """

    def __init__(self, terms: tuple[Term, ...], rewards: Mapping[str, Reward], standardized: bool = False) -> None:
        self.info = combined_info(terms)
        self.coefficients = {t.name: t.weight for t in terms}
        self.rewards, self.standardized = dict(rewards), standardized
        self.moments = {name: Moments() for name in self.coefficients}

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """The sum (B,), with the statistics as they stand."""
        return self.combine({name: checked_score(reward, images, prompts) for name, reward in self.rewards.items()})

    def parts(self) -> dict[str, Reward]:
        """The rewards that are added up."""
        return dict(self.rewards)

    def cuts(self, prompt: str) -> bool:
        """Whether any part cuts it."""
        return any(reward.cuts(prompt) for reward in self.rewards.values())

    def weights(self) -> tuple[Weights, ...]:
        """The files of all parts."""
        return tuple(file for reward in self.rewards.values() for file in reward.weights())

    def observe(self, scores: Mapping[str, torch.Tensor]) -> None:
        """Take the scores into the statistics."""
        for name, values in scores.items():
            self.moments[name].add(values)

    def combine(self, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The sum (B,) of the scores (B,) of `parts`."""
        return torch.stack([w * self._scaled(name, scores[name]) for name, w in self.coefficients.items()]).sum(0)

    def _scaled(self, name: str, values: torch.Tensor) -> torch.Tensor:
        moments = self.moments[name]
        return (values - moments.mean) / moments.std if self.standardized else values

    def provenance(self) -> dict[str, Any]:
        """Weight and provenance of each part."""
        return {name: {"weight": w, **self.rewards[name].provenance()} for name, w in self.coefficients.items()}

    def state_dict(self) -> dict[str, Any]:
        """The statistics."""
        return {name: [m.count, m.mean, m.squares] for name, m in self.moments.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the statistics."""
        self.moments = {name: Moments(*values) for name, values in state.items()}
