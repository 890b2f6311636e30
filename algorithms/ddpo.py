"""DDPO: policy gradient over the sampler's steps with importance ratios (arXiv:2305.13301, DDPO-IS, eq. 4).

    A    = (r - mean) / (deviation + 1e-6)    of the prompt's latest rewards, or of the iteration while those are few
    rho  = p_theta(x' | x, sigma, c) / p_old(x' | x, sigma, c)
    loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps))

The reference code is kvablack/ddpo-pytorch, commit 1958463f. As there:
- A prompt's rewards are kept over the whole run in a buffer (stat_tracking.py; sizes of config/dgx.py, `aesthetic`).
- The ratio uses log-probabilities averaged over latent dimensions, hence its small clip range (config/base.py).

Deviations from the paper and that code:
1. The stochastic sampler is Flow-SDE (2505.05470) instead of DDIM with eta 1, since the model is a flow.
2. `steps_per_image` sampler steps per image are drawn for the update; the code's `timestep_fraction` takes random steps
   too, and all of them by default.
3. A minibatch holds random transitions; the code's holds the transitions of a few images.
4. Stable Diffusion 3 takes 10 sampler steps, as in Flow-GRPO's code, where this one gives Stable Diffusion 1 50; it is
   guided by its own scale.
5. Images of a prompt come together, 24 in an iteration; the code draws a prompt for each image.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from flowbench.algorithm import Batch, Defaults, Loss, Rollout, register_algorithm
from flowbench.models.policy import Policy
from flowbench.toolkit.advantages import PromptBuffer
from flowbench.toolkit.policy_gradient import (
    STEP_DEFAULTS,
    STEP_SEARCH_SPACE,
    StepConfig,
    StepPolicyGradient,
    clipped_surrogate,
)


@register_algorithm("ddpo", paper="arXiv:2305.13301", needs={"states", "log_prob"}, family="policy-gradient")
class Ddpo(StepPolicyGradient["Ddpo.Config"]):
    """Denoising diffusion policy optimisation: a clipped policy gradient over the sampler's steps."""

    class Config(StepConfig):
        buffer_size: int = Field(32, ge=1, description="rewards kept of each prompt; reference code, `aesthetic`")
        min_count: int = Field(16, ge=1, description="rewards that a prompt is judged by its own from; reference code")

    cfg: Config
    defaults: ClassVar = {
        **STEP_DEFAULTS,
        # config/dgx.py, prompt_image_alignment, and config/base.py. Guided by the model's own scale: docs/guidance.md.
        "sd3.5-medium": Defaults(
            {
                "prompts_per_iteration": 12,  # the code's 288 images per iteration
                "images_per_prompt": 24,  # `min_count` or more, so that a prompt is judged by its own from the start
                "minibatch": 1296,  # two optimizer steps per iteration, of nine of the ten sampler steps
                "learning_rate": 3e-4,
            },
        ),
    }
    search_space: ClassVar = STEP_SEARCH_SPACE

    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        self.buffer = PromptBuffer(self.cfg.buffer_size, self.cfg.min_count)

    def advantages(self, rollout: Rollout) -> torch.Tensor:
        return self.buffer.advantages(rollout, self.cfg.advantage_clip)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        _, log_ratio = self.replay(policy, batch)
        surrogate, metrics = clipped_surrogate(batch.advantage, log_ratio, self.cfg.clip_range)
        return Loss(surrogate, metrics=metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"rewards": self.buffer.rewards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.rewards = {prompt: list(kept) for prompt, kept in state["rewards"].items()}
