"""The policy of an analytic model: points instead of images, and the exact field for evaluation."""

from __future__ import annotations

import copy

import torch

from flowbench.errors import UsageError
from flowbench.models.families.plane_field import VelocityField
from flowbench.models.policy import Policy


class AnalyticPolicy(Policy):
    """A policy over points in the plane; latents and "images" are the points themselves, (B, 2, 1, 1) and unbounded."""

    transformer: VelocityField

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The points themselves (B, 2, 1, 1)."""
        return latents

    def field(self, weights: str = "current") -> VelocityField:
        """A float64 copy of a view's velocity field, on the CPU."""
        module = self.transformer if weights == "current" else self._copies[weights]
        assert isinstance(module, VelocityField)
        return copy.deepcopy(module).double().cpu().requires_grad_(False)

    def _forward(
        self, module: torch.nn.Module, x: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        velocity: torch.Tensor = module(x.flatten(1), sigma.to(x.dtype))
        return velocity.view(x.shape)

    def _add_adapter(self, name: str) -> None:
        raise UsageError(f"model '{self.preset.name}' has no layers for LoRA; use training.tuning=full")
