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

import torch
from pydantic import Field

from flowbench.algorithm import Algorithm, AlgorithmConfig, Batch, Loss, Rollout, register_algorithm, transitions
from flowbench.flow import gaussian_log_prob
from flowbench.policy import Policy


@register_algorithm("ddpo", paper="arXiv:2305.13301", needs={"states", "log_prob"})
class Ddpo(Algorithm["Ddpo.Config"]):
    """Denoising diffusion policy optimisation: a clipped policy gradient over the sampler's steps."""

    class Config(AlgorithmConfig):
        clip_range: float = Field(1e-4, gt=0, description="eps; reference code")
        advantage_clip: float = Field(5.0, gt=0, description="bound on |A|; reference code")
        steps_per_image: int | None = Field(
            None, ge=1, description="sampler steps per image in the update; null is all"
        )

    cfg: Config

    def prepare(self, rollout: Rollout) -> Batch:
        """Rows are transitions, with the normalised and clipped advantage of their image."""
        advantage = rollout.center(rollout.reward) / (rollout.reward.std() + 1e-6)
        batch = transitions(rollout, advantage.clamp(-self.cfg.advantage_clip, self.cfg.advantage_clip))
        steps = len(batch) // len(rollout)
        if self.cfg.steps_per_image is None or self.cfg.steps_per_image >= steps:
            return batch
        order = self.policy.draw_noise(len(batch)).flatten(1)[:, 0].view(len(rollout), steps).argsort(1)
        chosen = order[:, : self.cfg.steps_per_image] + steps * torch.arange(len(rollout), device=order.device)[:, None]
        return batch.select(chosen.flatten())

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        taken = batch.transition()
        step = policy.transition(taken.x, taken.sigma, taken.sigma_next, batch.cond)
        log_ratio = (gaussian_log_prob(taken.x_next, step) - taken.log_prob_old) / batch.x0[0].numel()
        rho = log_ratio.exp()
        clipped = rho.clamp(1 - self.cfg.clip_range, 1 + self.cfg.clip_range)
        loss = torch.maximum(-batch.advantage * rho, -batch.advantage * clipped)
        outside = ((rho - 1).abs() > self.cfg.clip_range).float()
        return Loss(loss, metrics={"clipped": outside.mean(), "log_ratio": log_ratio.mean()})
