"""What policy gradients over sampler steps share: advantages, choice of steps, importance ratio, clipped surrogate.

A sampler's step is an action of a Markov decision process with a Gaussian density; the reward comes at the end (DDPO,
2305.13301, section 4). Ratios and divergences are means over latent dimensions, as in the reference implementations,
hence the small clip ranges. How likely a step is, and how far it is from the reference's, the sampler says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from pydantic import Field

from flowbench.algorithm import COMMON_SEARCH_SPACE, Algorithm, AlgorithmConfig, Defaults, Dimension, LogUniform
from flowbench.models.flow import Step
from flowbench.models.policy import Policy
from flowbench.rollout import Batch, Rollout, transitions
from flowbench.stored import HOST
from flowbench.toolkit.defaults import HAND_SEARCH, MINI_SD3_LORA, with_common


class StepConfig(AlgorithmConfig):
    """Hyperparameters of every algorithm of this kind."""

    clip_range: float = Field(1e-4, gt=0, description="eps; reference code")
    advantage_clip: float = Field(5.0, gt=0, description="bound on |A|; reference code")
    steps_per_image: int | None = Field(None, ge=1, description="sampler steps per image in the update; null is all")


STEP_DEFAULTS: Mapping[str, Defaults] = {
    # LoRA leaves the noise fewer directions.
    "mini-sd3": with_common("mini-sd3", "policy-gradient", {**MINI_SD3_LORA, "learning_rate": 1.5e-3}, log=HAND_SEARCH),
    # The log-probabilities of two dimensions need a wider clip range than those of an image's latents.
    "gaussian": with_common("gaussian", "policy-gradient", {"learning_rate": 3e-3}, {"clip_range": 0.1}),
    "mixture": with_common("mixture", "policy-gradient", {"learning_rate": 2e-4}, {"clip_range": 0.1}),
}

STEP_SEARCH_SPACE: Mapping[str, Dimension] = {
    **COMMON_SEARCH_SPACE,
    "algorithm.clip_range": LogUniform(1e-5, 1e-3),  # 1e-4: the codes of DDPO, DPOK and Flow-GRPO
}

S = TypeVar("S", bound=StepConfig)


def clipped_surrogate(
    advantage: torch.Tensor, log_ratio: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), PPO (1707.06347, eq. 7), (R,), and its metrics per row."""
    rho = log_ratio.exp()
    clipped = rho.clamp(1 - clip_range, 1 + clip_range)
    outside = ((rho - 1).abs() > clip_range).float()
    loss = torch.maximum(-advantage * rho, -advantage * clipped)
    return loss, {"clipped": outside, "log_ratio": log_ratio}


class StepPolicyGradient(Algorithm[S]):
    """Base class: rows are transitions of a stochastic sampler. Subclasses define the loss, and mostly `advantages`."""

    def advantages(self, rollout: Rollout) -> torch.Tensor:
        """The advantage of each image, (B,): by the iteration's deviation from the prompt's mean, clipped."""
        return rollout.normalized_advantage(self.cfg.advantage_clip)

    def prepare(self, rollout: Rollout) -> Batch:
        """Transitions with the advantage of their image, all of them or a random share."""
        batch = transitions(rollout, self.advantages(rollout))
        steps = len(batch) // len(rollout)
        if self.cfg.steps_per_image is None or self.cfg.steps_per_image >= steps:
            return batch
        order = self.policy.draw_noise(len(batch), HOST).flatten(1)[:, 0].view(len(rollout), steps).argsort(1)
        chosen = order[:, : self.cfg.steps_per_image] + steps * torch.arange(len(rollout), device=order.device)[:, None]
        return batch.select(chosen.flatten())

    def replay(self, policy: Policy, batch: Batch) -> tuple[Step, torch.Tensor]:
        """The policy's Gaussian where each row's step was taken, and log rho averaged over latent dimensions, (R,)."""
        taken = batch.transition()
        step = policy.transition(taken.x, taken.sigma, taken.sigma_next, batch.cond)
        return step, (policy.sampler.log_prob(taken.x_next, step) - taken.log_prob_old) / batch.x0[0].numel()

    def divergence(self, policy: Policy, batch: Batch, step: Step) -> torch.Tensor:
        """How far the policy's `step` is from the reference's, summed over latent dimensions, (R,).

        The sampler's divergence: the exact KL of the two Gaussians for all but "cps".
        """
        taken = batch.transition()
        reference = policy.transition(taken.x, taken.sigma, taken.sigma_next, batch.cond, weights="reference")
        return policy.sampler.divergence(step, reference)
