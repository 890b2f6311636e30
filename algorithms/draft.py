"""DRaFT: direct reward fine-tuning through the sampler (arXiv:2309.17400, algorithm 1).

    DRaFT-K    x_K = state K steps before the end, reached without gradient;  x0 = the sampler's last K steps from x_K
    DRaFT-LV   x_1 = (1 - sigma_1) x0 + sigma_1 eps for n draws of eps;       x0' = the sampler's last step from x_1
    loss       -r(decode(x0), c), in LV averaged over the n draws

Deviations from the paper (which has no public code):
1. The sampler is the flow's (Euler steps of the ODE by default) instead of DDIM.
2. Sampling and training are two passes: the K steps are computed again with gradient, with the weights of that moment.
   In an iteration's first minibatch they reproduce the images that were scored.
3. LV averages the gradient over the n draws, where the paper sums it, and leaves out the sampler's own last step.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, ValidationInfo, field_validator

from flowbench.algorithm import (
    COMMON_SEARCH_SPACE,
    Algorithm,
    AlgorithmConfig,
    Batch,
    Choice,
    Defaults,
    Draws,
    Loss,
    Rollout,
    endpoints,
    register_algorithm,
    visited,
)
from flowbench.errors import UsageError
from flowbench.models.flow import interpolate
from flowbench.models.policy import Policy
from flowbench.toolkit.defaults import HAND_SEARCH, with_common


@register_algorithm("draft", paper="arXiv:2309.17400", needs={"states", "reward_grad"}, family="reward-gradient")
class Draft(Algorithm["Draft.Config"]):
    """Direct reward fine-tuning: back-propagates the reward through the sampler's last steps."""

    class Config(AlgorithmConfig):
        steps: int = Field(1, ge=1, description="K; paper: 1 is the most efficient")
        noises: int = Field(0, ge=0, description="n of DRaFT-LV, with K = 1; 0 is DRaFT-K; paper: 2")

        @field_validator("noises")
        @classmethod
        def _only_with_one_step(cls, noises: int, info: ValidationInfo) -> int:
            if noises and info.data.get("steps", 1) != 1:
                raise ValueError("DRaFT-LV has one step; set algorithm.steps=1 or algorithm.noises=0")
            return noises

    cfg: Config
    metrics: ClassVar = {
        "reward_replayed": "mean reward of the images computed again with gradient",
    }
    defaults: ClassVar = {
        "mini-sd3": with_common("mini-sd3", "reward-gradient", {"learning_rate": 1.5e-4}, log=HAND_SEARCH),
        # The pipeline's own grid ends with a step that changes nothing: two are the paper's one (docs/sampling.md).
        "sd3.5-medium": Defaults({}, {"steps": 2}),
    }
    search_space: ClassVar = {
        **COMMON_SEARCH_SPACE,
        "algorithm.steps": Choice((1, 2, 4, 8)),  # 1: the paper's most efficient
    }

    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        if self.cfg.steps > policy.num_steps:
            raise UsageError(f"algorithm.steps is {self.cfg.steps}, but the sampler takes {policy.num_steps} steps")

    def needs(self) -> frozenset[str]:
        return self.info.needs - {"states"} if self.cfg.noises else self.info.needs

    def draws(self) -> Draws:
        """The noise of LV's state, then that of a stochastic sampler's steps."""
        noises = bool(self.cfg.noises) + self.cfg.steps * self.policy.sampler.has_log_prob
        return Draws(noises=noises, fixed=True)

    def prepare(self, rollout: Rollout) -> Batch:
        """One row per image, at its state K steps before the end; for LV one per image and draw of noise."""
        self.sigmas = rollout.sigmas[-self.cfg.steps - 1 :]
        if self.cfg.noises:
            return endpoints(rollout, rollout.reward, copies=self.cfg.noises)
        before_end = torch.full_like(rollout.group, len(rollout.sigmas) - 1 - self.cfg.steps)
        return visited(rollout, rollout.reward, before_end)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        noise = batch.x0[:, None] if batch.noise is None else batch.noise  # an ODE's steps have none
        if self.cfg.noises:
            x, noise = interpolate(batch.x0, noise[:, 0], self.sigmas[0]), noise[:, 1:]
        else:
            x, _ = batch.state()
        x0 = policy.denoise(x, self.sigmas, batch.cond, noise)
        reward = self.score(policy.decode(x0), batch.prompts)
        return Loss(-reward, metrics={"reward_replayed": reward})
