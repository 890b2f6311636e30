"""Velocities of a policy: through which weight view, with which guidance, and by what stands in for its weights."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from flowbench.models.counting import SAMPLING, Evaluations
from flowbench.models.families.base import Family
from flowbench.models.flow import SAMPLERS
from flowbench.models.guidance import BOTH_AT_ONCE, with_negative
from flowbench.models.sampling import Samples, Sampling
from flowbench.models.stand_ins import StandIn, converted
from flowbench.models.texts import TextCache
from flowbench.models.views import ANCHOR, Views
from flowbench.rollout import Conditioning


class Velocities(Sampling, ABC):
    """What a policy computes with its transformer. `Policy` says which one, and what its weights are."""

    family: Family
    views: Views
    texts: TextCache
    guidance_scale: float | None
    rollout_dtype: torch.dtype | None
    evaluations: Evaluations
    gradient_checkpointing: bool
    _anchored = False
    _frozen = False
    _low: torch.dtype | None = None
    _low_vae: StandIn | None = None

    @property
    def function_evaluations(self) -> int:
        """Velocities of one latent each that training took, backward passes aside."""
        return self.evaluations.total

    def velocity(
        self, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning, weights: str = "current", grad: bool = False
    ) -> torch.Tensor:
        """v(x_sigma, sigma, c); x (R, C, h, w), sigma (R,). Without classifier-free guidance.

        A model whose guidance is an input is given that of training. Through the view "current" weights and x have
        gradients; through the others x has one with `grad`, and their weights never do.

        Raises UsageError for a view that nobody asked for.
        """
        return self._velocity(x, sigma, cond, weights, grad, self._scale(None))

    @torch.no_grad()
    def velocity_and_hidden(
        self, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning, weights: str = "current"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """v as in `velocity`, and what its last layer is given: hidden states (R, L, D), None where a family has none.

        Without gradient.
        """
        kept: list[torch.Tensor] = []
        with self.views.use(self._view(weights)) as module:
            layer = self.family.last_norm(module)
        hook = layer and layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            v = self.velocity(x, sigma, cond, weights)
        finally:
            if hook:
                hook.remove()
        return v, kept[0].float() if kept else None

    def guided_velocity(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        cond: Conditioning,
        weights: str = "current",
        guidance_scale: float | None = None,
        grad: bool = False,
    ) -> torch.Tensor:
        """The velocity that the sampler follows: with guidance, in the family's own form, if its scale is above 1.

        guidance_scale None is that of training; `grad` as in `velocity`.
        """
        scale = self._scale(guidance_scale)
        if scale <= 1.0 or not self.family.classifier_free:
            return self._velocity(x, sigma, cond, weights, grad, scale)
        negative = self.texts.negative(len(x))
        if len(x) <= BOTH_AT_ONCE:
            both = with_negative(cond, negative)
            v, v_negative = self._velocity(x.repeat(2, 1, 1, 1), sigma.repeat(2), both, weights, grad, scale).chunk(2)
        else:
            v = self._velocity(x, sigma, cond, weights, grad, scale)
            v_negative = self._velocity(x, sigma, negative, weights, grad, scale)
        return self.family.guide(v, v_negative, scale)

    def _velocity(
        self, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning, weights: str, grad: bool, scale: float
    ) -> torch.Tensor:
        weights = self._view(weights)
        trained = weights == "current"
        self.evaluations.add(len(x), trained, torch.is_grad_enabled() and (grad or trained))
        # A graph holds a view's own weights; what stands in for them may only be seen where there is none.
        frozen = not grad and (weights != "current" or self._frozen)
        with (
            nullcontext() if grad or weights == "current" else torch.no_grad(),
            self.views.use(weights, frozen) as module,
        ):
            return self.family.velocity(module, x, sigma, cond.rows(), scale)

    @contextmanager
    def frozen(self, weights: str) -> Iterator[None]:
        """Within it no weight changes and none needs a gradient, so that a view's weights are prepared once."""
        if self._frozen:
            yield
            return
        self.views.forget()
        self._frozen = True
        try:
            with torch.no_grad(), self.views.use(self._view(weights), frozen=True):
                yield
        finally:
            self._frozen = False
            self.views.forget()

    @contextmanager
    def rollout_precision(self) -> Iterator[None]:
        """Within it, rollouts and images are computed in the precision of `training.rollout_dtype`.

        Not those of a sampler whose steps have a log-probability: the ratio of an update would compare two precisions.
        """
        self._low = self.rollout_dtype
        try:
            yield
        finally:
            self._low = None

    def rollout(self, cond: Conditioning, noise: torch.Tensor, **options: Any) -> Samples:
        """As in the base class, with the view's weights prepared once for all steps."""
        plain = not options.get("sampler", SAMPLERS["ode"]).has_log_prob
        self.views.precision = self._low if plain else None
        try:
            with self.evaluations.counted_as(SAMPLING), self.frozen(options.get("weights", "current")):
                return super().rollout(cond, noise, **options)
        finally:
            self.views.precision = None

    def complete(self, *state: Any, **options: Any) -> torch.Tensor:
        """As in the base class."""
        with self.evaluations.counted_as(SAMPLING):
            return super().complete(*state, **options)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) float32 in [0, 1] on the device; differentiable when gradients are on.

        With gradient checkpointing each image is then decoded on its own, and again in the backward pass: the memory
        that many images take is that of one.
        """
        latents = latents.to(self.device)
        if self._low is None or torch.is_grad_enabled():
            return self.family.decode(latents, checkpoint=self.gradient_checkpointing)
        if self._low_vae is None:
            vae = self.family.pipeline.vae
            self._low_vae = StandIn(converted(vae.parameters(), self._low), adapters=False)
        with self._low_vae.in_use():
            return self.family.decode(latents)

    def _view(self, weights: str) -> str:
        anchored = weights == "reference" and self._anchored and self.views.has(ANCHOR)
        return ANCHOR if anchored else weights

    def _scale(self, guidance_scale: float | None) -> float:
        return next(s for s in (guidance_scale, self.guidance_scale, self.preset.guidance_scale) if s is not None)
