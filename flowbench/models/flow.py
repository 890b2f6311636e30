"""The mathematics of flow matching: paths, sampler steps, log-probabilities. Pure functions of tensors.

SD3's convention: sigma = 1 is noise, sigma = 0 is the image; x_sigma = (1 - sigma) x0 + sigma eps; the target velocity
is u = eps - x0. Latents are (B, ...); sigma is a (B,) tensor or a float.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from flowbench.errors import UsageError, did_you_mean

Sigma: TypeAlias = "torch.Tensor | float"


def expand(sigma: Sigma, like: torch.Tensor) -> torch.Tensor:
    """sigma as a tensor that broadcasts over the latent dimensions of `like`."""
    sigma = torch.as_tensor(sigma, dtype=like.dtype, device=like.device)
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim)) if sigma.ndim else sigma


def interpolate(x0: torch.Tensor, eps: torch.Tensor, sigma: Sigma) -> torch.Tensor:
    """x_sigma = (1 - sigma) x0 + sigma eps, the straight path of rectified flow (2403.03206, eq. 13)."""
    s = expand(sigma, x0)
    return (1 - s) * x0 + s * eps


def predict_x0(x: torch.Tensor, v: torch.Tensor, sigma: Sigma) -> torch.Tensor:
    """x0_hat = x_sigma - sigma v."""
    return x - expand(sigma, x) * v


def velocity_error(v: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over latent dimensions of the squared difference of two velocities, (B,)."""
    return (v - target).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Step:
    """One transition of a sampler: a Gaussian with this mean (B, ...) and this standard deviation (broadcastable)."""

    mean: torch.Tensor
    std: torch.Tensor


def ode_step(x: torch.Tensor, v: torch.Tensor, sigma: Sigma, sigma_next: Sigma, eta: float) -> Step:
    """Euler: x' = x + v d with d = sigma' - sigma < 0; deterministic, eta is ignored."""
    s, s_next = expand(sigma, x), expand(sigma_next, x)
    return Step(x + v * (s_next - s), torch.zeros_like(s))


def flow_sde_step(x: torch.Tensor, v: torch.Tensor, sigma: Sigma, sigma_next: Sigma, eta: float) -> Step:
    """Flow-SDE (Flow-GRPO, 2505.05470, eq. 9): keeps the ODE's marginals as steps grow; eta 0.7 there."""
    s, s_next = expand(sigma, x), expand(sigma_next, x)
    d = s_next - s
    # At sigma = 1 the diffusion is singular; the reference takes the next sigma in the denominator.
    std = eta * torch.sqrt(s / (1 - torch.where(s >= 1, s_next, s)))
    mean = x * (1 + std**2 * d / (2 * s)) + v * (1 + std**2 * (1 - s) / (2 * s)) * d
    return Step(mean, std * torch.sqrt(-d))


def cps_step(x: torch.Tensor, v: torch.Tensor, sigma: Sigma, sigma_next: Sigma, eta: float) -> Step:
    """Coefficients-preserving sampling (2509.05952): the right noise level by construction, other marginals."""
    s, s_next = expand(sigma, x), expand(sigma_next, x)
    std = s_next * math.sin(eta * math.pi / 2)
    x0_hat, x1_hat = x - s * v, x + (1 - s) * v
    return Step((1 - s_next) * x0_hat + torch.sqrt(s_next**2 - std**2) * x1_hat, std)


def dance_sde_step(x: torch.Tensor, v: torch.Tensor, sigma: Sigma, sigma_next: Sigma, eta: float) -> Step:
    """DanceGRPO's SDE (2505.07818): constant diffusion eta."""
    s, s_next = expand(sigma, x), expand(sigma_next, x)
    d = s_next - s
    x0_hat = x - s * v
    mean = x + (v + eta**2 * (x - (1 - s) * x0_hat) / (2 * s**2)) * d
    return Step(mean, eta * torch.sqrt(-d))


def gaussian_log_prob(x: torch.Tensor, step: Step) -> torch.Tensor:
    """log N(x; mean, std^2 I), summed over latent dimensions, (B,)."""
    std = step.std.expand_as(x)
    log_density = -0.5 * ((x - step.mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).sum(1)


def gaussian_kl(step: Step, reference: Step) -> torch.Tensor:
    """KL between two steps of equal standard deviation, summed over latent dimensions, (B,)."""
    return ((step.mean - reference.mean) / reference.std).square().flatten(1).sum(1) / 2


def negative_squared_distance(x: torch.Tensor, step: Step) -> torch.Tensor:
    """-|x - mean|^2, summed over latent dimensions, (B,); infinite where the step has no noise.

    Flow-CPS's log-probability (IamCreateAI/FlowCPS, commit 814c3597, sd3_sde_with_logprob.py; the same in
    yifan123/flow_grpo and X-GenGroup/Flow-Factory): N's with its constants left out, 1 / (2 std^2) among them, so that
    steps count alike however little noise they have.
    """
    noisy = step.std.expand_as(x).flatten(1)[:, 0] > 0
    return torch.where(noisy, -(x - step.mean).square().flatten(1).sum(1), torch.inf)


def squared_distance(step: Step, reference: Step) -> torch.Tensor:
    """|mean - mean_ref|^2 of two steps, summed over latent dimensions, (B,).

    Flow-CPS's divergence (IamCreateAI/FlowCPS, commit 814c3597, scripts/train_sd3.py): without 1 / (2 std^2), as its
    log-probability.
    """
    return (step.mean - reference.mean).square().flatten(1).sum(1)


def unchanged(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    """1 for each step, (B,)."""
    return torch.ones_like(sigma)


def step_size(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    """|d| of each step, (B,)."""
    return sigma - sigma_next


@dataclass(frozen=True)
class Sampler:
    """A sampler: its step, and what its reference implementation says of how likely steps are.

    step: x, v (B, ...), sigma, sigma_next and the noise level eta to a `Step`. has_log_prob: whether its steps are
    drawn, so that the others mean something. log_prob: of a next state under a step, (B,), infinite for a step without
    noise; what does not depend on v may be left out, since it cancels in ratios. divergence: of a step from the
    reference model's, (B,). code_factor: sigma and sigma_next (B,) to what its code's KL is of that divergence, (B,).
    """

    step: Callable[[torch.Tensor, torch.Tensor, Sigma, Sigma, float], Step]
    has_log_prob: bool
    log_prob: Callable[[torch.Tensor, Step], torch.Tensor] = gaussian_log_prob
    divergence: Callable[[Step, Step], torch.Tensor] = gaussian_kl
    code_factor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = unchanged


SAMPLERS: dict[str, Sampler] = {
    "ode": Sampler(ode_step, has_log_prob=False),
    # Its code divides by the square of the diffusion coefficient instead of the step's variance, which is |d| as large
    # (yifan123/flow_grpo, commit ac4c86e8, scripts/train_sd3.py).
    "flow-sde": Sampler(flow_sde_step, has_log_prob=True, code_factor=step_size),
    "cps": Sampler(cps_step, has_log_prob=True, log_prob=negative_squared_distance, divergence=squared_distance),
    "dance-sde": Sampler(dance_sde_step, has_log_prob=True),
}


def get_sampler(name: str) -> Sampler:
    """The sampler of that name.

    Raises UsageError for an unknown one.
    """
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler '{name}'{did_you_mean(name, SAMPLERS)}")
    return SAMPLERS[name]
