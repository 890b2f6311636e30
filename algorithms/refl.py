"""ReFL: reward feedback learning (arXiv:2304.05977, algorithm 1).

    t    = one random late step of the sampler, reached without gradient
    loss = lambda relu(2 - r(decode(x0_hat), c)),   x0_hat = x_sigma - sigma v(x_sigma, sigma, c)

Deviations from the paper and its reference code (THUDM/ImageReward, ImageReward/ReFL.py, Stable Diffusion 1.4):
1. The late steps are the last share `late` of the sampler's steps; the code has the last 10 of 40.
2. The step is drawn per image instead of per batch.
3. The paper adds a pre-training loss on image-text pairs, which a benchmark of reward fine-tuning does not have; its
   code leaves that loss out too. The velocity's distance to the reference, with weight `alpha`, can stand for it.
   Default 0: then nothing pulls to the reference.
4. The code samples and trains without guidance, as here on SD3. On another model both follow
   `training.guidance_scale`, by default the model's own scale.
5. The margin 2 and lambda 1e-3 are the code's, for ImageReward, whose scores spread by 1; CLIP scores never reach it.
6. Learning rate, decay and batch are the run's own (code: AdamW 1e-5, decay 1e-2, 2 images x 4 accumulated).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from flowbench.algorithm import (
    COMMON_SEARCH_SPACE,
    Algorithm,
    AlgorithmConfig,
    Batch,
    Defaults,
    LogUniform,
    Loss,
    Rollout,
    register_algorithm,
    visited,
)
from flowbench.models.flow import predict_x0, velocity_error
from flowbench.models.policy import Policy
from flowbench.toolkit.defaults import HAND_SEARCH, with_common


@register_algorithm("refl", paper="arXiv:2304.05977", needs={"states", "reward_grad"}, family="reward-gradient")
class Refl(Algorithm["Refl.Config"]):
    """Reward feedback learning: back-propagates the reward through one late sampler step."""

    class Config(AlgorithmConfig):
        scale: float = Field(1e-3, gt=0, description="lambda; reference code")
        margin: float = Field(2.0, description="rewards above it have no gradient; reference code")
        late: float = Field(
            0.25, gt=0, le=1, description="share of the sampler's steps that count as late; reference code: 10 of 40"
        )
        alpha: float = Field(0.0, ge=0, description="weight of mean_d (v - v_ref)^2")

    cfg: Config
    metrics: ClassVar = {
        "reward_x0_hat": "mean reward of the one-step predictions x0_hat",
    }
    defaults: ClassVar = {
        "mini-sd3": with_common("mini-sd3", "reward-gradient", {"learning_rate": 3e-4}, log=HAND_SEARCH),
        "sd3.5-medium": Defaults({"guidance_scale": 1.0}),  # as the reference code: docs/guidance.md
    }
    search_space: ClassVar = {
        **COMMON_SEARCH_SPACE,
        "algorithm.late": LogUniform(0.025, 1.0),  # 0.25: the paper's steps 30 to 40 of 40
    }

    def prepare(self, rollout: Rollout) -> Batch:
        """One row per image: its state at a random late step."""
        steps = len(rollout.sigmas) - 1
        late = max(1, round(self.cfg.late * steps))
        step = steps - late + self.policy.draw_integers(late, len(rollout))
        return visited(rollout, rollout.reward, step)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        x, sigma = batch.state()
        v = policy.guided_velocity(x, sigma, batch.cond)
        x0_hat = predict_x0(x, v, sigma)
        reward = self.score(policy.decode(x0_hat), batch.prompts)
        loss = self.cfg.scale * (self.cfg.margin - reward).relu()
        if self.cfg.alpha:
            v_ref = policy.guided_velocity(x, sigma, batch.cond, weights="reference")
            loss = loss + self.cfg.alpha * velocity_error(v, v_ref)
        return Loss(loss, metrics={"reward_x0_hat": reward})
