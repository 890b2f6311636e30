"""The plane: points instead of images, an exact velocity field, and no text that says anything."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flowbench.errors import UsageError
from flowbench.models.families.base import Family, NamedTensors, Parts
from flowbench.models.families.plane_field import TEXT_WIDTH, VelocityField
from flowbench.testbeds.plane.density import make_density

if TYPE_CHECKING:
    from flowbench.models.policy import Policy
    from flowbench.models.presets import ModelPreset


@dataclass
class PlanePipeline:
    """What stands in a pipeline's place; there are no text encoders, no VAE and no scheduler."""

    transformer: VelocityField

    @property
    def components(self) -> dict[str, nn.Module]:
        """The parts with weights."""
        return {"transformer": self.transformer}


class Plane(Family):
    """Points in the plane; latents and "images" are the points themselves, (B, 2, 1, 1) and unbounded."""

    name = "plane"
    text_encoders = ()

    @classmethod
    def load(cls, preset: ModelPreset, device: torch.device, parts: Parts = "all") -> PlanePipeline:
        """The reference model that the preset describes; it has no parts.

        Raises UsageError for a density that is unknown or ill described.
        """
        analytic: Any = preset  # an AnalyticPreset
        return PlanePipeline(VelocityField(make_density(analytic.density_kind, analytic.density)))

    def encode(self, prompts: list[str], device: torch.device) -> list[NamedTensors]:
        """The same empty embedding for every prompt."""
        return [{"pooled": p} for p in torch.zeros(len(prompts), TEXT_WIDTH)]

    @property
    def text_width(self) -> int:
        """Of the empty embedding."""
        return TEXT_WIDTH

    def summarize(self, text: NamedTensors) -> torch.Tensor:
        """Zeros."""
        return text["pooled"]

    def velocity(
        self, module: torch.nn.Module, x: torch.Tensor, sigma: torch.Tensor, text: NamedTensors, scale: float
    ) -> torch.Tensor:
        """As in the base class, in the dtype of x."""
        return self.predict(module, x, sigma, text, scale)

    def predict(
        self, module: torch.nn.Module, x: torch.Tensor, sigma: torch.Tensor, text: NamedTensors, scale: float
    ) -> torch.Tensor:
        """As in the base class; the text is not read."""
        velocity: torch.Tensor = module(x.flatten(1), sigma.to(x.dtype))
        return velocity.view(x.shape)

    def lower_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """As in the base class."""
        if dtype != torch.float32:
            raise UsageError(f"model '{self.preset.name}' is a formula; use training.rollout_dtype=float32")
        return None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """A point."""
        return (self.transformer.density.width, 1, 1)

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """As in the base class; always evenly spaced, and not shifted."""
        return torch.linspace(1, 0, num_steps + 1)

    def decode(self, latents: torch.Tensor, checkpoint: bool = False) -> torch.Tensor:
        """The points themselves (B, 2, 1, 1)."""
        return latents


def on_plane(policy: Policy) -> bool:
    """Whether the policy's "images" are points in the plane."""
    return isinstance(policy.family, Plane)


def exact_field(policy: Policy, weights: str = "current") -> VelocityField:
    """A float64 copy of the velocity field of a policy on the plane, for one of its weight views, on the CPU."""
    with policy.views.use(weights) as module:
        found: Any = copy.deepcopy(module)
    assert isinstance(found, VelocityField)
    return found.double().cpu().requires_grad_(False)
