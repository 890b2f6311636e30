"""The exact gradient of the mean reward in the plane, in all weights of the tuned field."""

from __future__ import annotations

from itertools import pairwise

import torch

from flowbench.evaluation.exact import REACH, SPACING, disc
from flowbench.models.families.plane import exact_field
from flowbench.models.families.plane_field import VelocityField
from flowbench.models.flow import Sampler
from flowbench.models.policy import Policy
from flowbench.testbeds.plane.density import Gaussian, QuadraticForm


def exact_gradient(
    policy: Policy, reward: QuadraticForm, sampler: Sampler, sigmas: torch.Tensor, eta: float
) -> torch.Tensor | None:
    """The gradient (D,) float64 of E[r] of the sampler's points at sigmas (T + 1,), in `trainable_parameters`' order.

    A Gaussian's is in closed form for every sampler; a mixture's is by quadrature over the first noise, and None for a
    sampler that adds noise of its own.
    """
    field, sigmas = exact_field(policy).requires_grad_(True), sigmas.double().cpu()
    if isinstance(field.density, Gaussian):
        value = _of_moments(field, reward, sampler, sigmas, eta)
    elif not sampler.has_log_prob:
        value = _by_quadrature(field, reward, sampler, sigmas, eta)
    else:
        return None
    return torch.cat([slope.flatten() for slope in torch.autograd.grad(value, list(field.parameters()))])


def _of_moments(
    field: VelocityField, reward: QuadraticForm, sampler: Sampler, sigmas: torch.Tensor, eta: float
) -> torch.Tensor:
    """E[r] of a field that is affine in x: every step maps mean and covariance, and may add a variance."""
    width = field.density.width
    eye = torch.eye(width).double()
    mean, covariance, corners = torch.zeros(width).double(), eye, torch.cat([torch.zeros(1, width).double(), eye])
    for sigma, sigma_next in pairwise(sigmas):
        step = sampler.step(corners, field(corners, sigma.expand(width + 1)), sigma, sigma_next, eta)
        slope = (step.mean[1:] - step.mean[0]).T
        mean = slope @ mean + step.mean[0]
        covariance = slope @ covariance @ slope.T + step.std**2 * eye
    return reward(mean[None])[0] - (reward.curvature * covariance).sum() / 2


def _by_quadrature(
    field: VelocityField, reward: QuadraticForm, sampler: Sampler, sigmas: torch.Tensor, eta: float
) -> torch.Tensor:
    x = disc(REACH, SPACING)
    weight = (-x.square().sum(1) / 2).softmax(0)
    for sigma, sigma_next in pairwise(sigmas):
        x = sampler.step(x, field(x, sigma.expand(len(x))), sigma, sigma_next, eta).mean
    return (weight * reward(x)).sum()
