"""DDPO: policy gradient over the sampler's steps with importance ratios (arXiv:2305.13301, DDPO-IS, eq. 4).

    rho  = p_theta(x' | x, sigma, c) / p_old(x' | x, sigma, c)
    loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps))

Deviations from the paper and its reference code (kvablack/ddpo-pytorch):
1. The stochastic sampler is Flow-SDE (2505.05470) instead of DDIM with eta 1, since the model is a flow.
2. Rewards are normalised by the mean of the prompt's images in the same iteration and the standard deviation of the
   whole iteration; the reference keeps a running buffer per prompt, which small budgets never fill.
3. As the reference does, the ratio uses log-probabilities averaged over latent dimensions, hence its small clip range.
4. `steps_per_image` sampler steps per image are drawn for the update; the reference's `timestep_fraction`.
"""

from __future__ import annotations

from typing import ClassVar

from flowbench.algorithm import Batch, Loss, register_algorithm
from flowbench.models.policy import Policy
from flowbench.toolkit.policy_gradient import (
    STEP_DEFAULTS,
    STEP_SEARCH_SPACE,
    StepConfig,
    StepPolicyGradient,
    clipped_surrogate,
)


@register_algorithm("ddpo", paper="arXiv:2305.13301", needs={"states", "log_prob"})
class Ddpo(StepPolicyGradient["Ddpo.Config"]):
    """Denoising diffusion policy optimisation: a clipped policy gradient over the sampler's steps."""

    class Config(StepConfig):
        """Clip ranges as in the reference code."""

    cfg: Config
    defaults: ClassVar = STEP_DEFAULTS
    search_space: ClassVar = STEP_SEARCH_SPACE

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        _, log_ratio = self.replay(policy, batch)
        surrogate, metrics = clipped_surrogate(batch.advantage, log_ratio, self.cfg.clip_range)
        return Loss(surrogate, metrics=metrics)
