"""DPOK: policy gradient with KL regularisation to the pre-trained model (arXiv:2305.16381, the online variant KL-O).

    rho  = p_theta(x' | x, sigma, c) / p_old(x' | x, sigma, c)
    KL   = KL(p_theta(. | x, sigma, c) || p_ref(. | x, sigma, c)) = |mu - mu_ref|^2 / (2 std^2)      per step, exact
    loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + beta KL / D

Both terms are divided by the number of latent dimensions D, so that the objective is E[A] - beta sum of KL, in nats.

Deviations from the paper and its reference code (google-research/dpok):
1. The stochastic sampler is Flow-SDE (2505.05470) instead of DDIM with eta 1, since the model is a flow.
2. The code replaces the KL by the mean squared difference of the two noise predictions; here it is the KL.
3. The code weighs the reward by 100 and the KL by 0.01; here A has deviation 1 within an iteration.
4. The code subtracts a learned value of state and time; here, as in DDPO, the prompt's mean.
5. The code clips the ratio on both sides whatever A; here PPO's pessimistic form, as in DDPO. The range is the code's.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from flowbench.algorithm import Batch, LogUniform, Loss, register_algorithm
from flowbench.models.policy import Policy
from flowbench.toolkit.policy_gradient import (
    STEP_DEFAULTS,
    STEP_SEARCH_SPACE,
    StepConfig,
    StepPolicyGradient,
    clipped_surrogate,
)


@register_algorithm("dpok", paper="arXiv:2305.16381", needs={"states", "log_prob"})
class Dpok(StepPolicyGradient["Dpok.Config"]):
    """Policy gradient over the sampler's steps with the exact KL of each step to the reference."""

    class Config(StepConfig):
        beta: float = Field(0.01, ge=0, description="weight of the KL in nats; reference code's kl_weight")

    cfg: Config
    defaults: ClassVar = STEP_DEFAULTS
    search_space: ClassVar = {
        **STEP_SEARCH_SPACE,
        "algorithm.beta": LogUniform(1e-3, 0.1),  # 0.01: reference code's kl_weight
    }

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        step, log_ratio = self.replay(policy, batch)
        loss, metrics = clipped_surrogate(batch.advantage, log_ratio, self.cfg.clip_range)
        if self.cfg.beta:
            kl = self.divergence(policy, batch, step)
            loss, metrics["kl"] = loss + self.cfg.beta * kl / batch.x0[0].numel(), kl
        return Loss(loss, metrics=metrics)
