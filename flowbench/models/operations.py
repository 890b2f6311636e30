"""How many floating-point operations a run's velocities are, from one call of each kind, counted by torch."""

from __future__ import annotations

import logging

import torch

from flowbench.models.counting import BACKWARD, FORWARD, Evaluations
from flowbench.models.policy import Policy

logger = logging.getLogger("flowbench")


def training_flops(policy: Policy) -> float | None:
    """Operations of all velocities that training took, forward and backward; None where torch cannot count them.

    Matrix products, convolutions and attention of the tuned model alone: no VAE, text encoder, reward or critic. An
    addition and a multiplication are two. Uses no random numbers and leaves no gradient.
    """
    if policy.compiled:
        return None
    counted, policy.evaluations = policy.evaluations, Evaluations()
    try:
        forward, backward = _of_one(policy)
    except (RuntimeError, NotImplementedError) as error:  # a finished run is worth more than its operations
        logger.debug("operations cannot be counted: %s", error)
        return None
    finally:
        policy.evaluations = counted
    passes = sum(counted.counts.get(purpose, 0) for purpose in FORWARD)
    return float(passes * forward + counted.counts.get(BACKWARD, 0) * backward) if forward else None


def _of_one(policy: Policy) -> tuple[int, int]:
    """Operations of the forward and of the backward pass of one velocity."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(1, *policy.latent_shape, device=policy.device)
    sigma, cond = torch.full((1,), 0.5, device=policy.device), policy.encode([""])
    # Fused attention is not counted on every device; spelled out, it is two matrix products.
    with sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            policy.velocity(x, sigma, cond)
        with torch.enable_grad(), FlopCounterMode(display=False) as both:
            v = policy.velocity(x, sigma, cond)
            torch.autograd.grad(v.float().sum(), policy.trainable_parameters(), allow_unused=True)
    return forward.get_total_flops(), both.get_total_flops() - forward.get_total_flops()
