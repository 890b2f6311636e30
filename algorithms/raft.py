"""RAFT: reward-ranked fine-tuning (arXiv:2304.06767, algorithm 1).

    kept = the best `share` of each prompt's images
    loss = mean_d (v - u)^2 + alpha mean_d (v - v_ref)^2      on the kept images

Deviations from the paper (which has no code for flows):
1. The supervised loss is flow matching on the model's own images; the paper fine-tunes Stable Diffusion with the noise
   prediction loss, on samples of the same kind.
2. The paper keeps the best 1 of K samples; here K is the group size of the run (4 by default), and `share` 0.25.
3. One pass per iteration on fresh samples, where the paper collects a large set per stage.
4. Each round moves the samples to their best, so that with `alpha` 0 nothing stops it before the images of a prompt are
   alike: it follows the frontier outward (docs/algorithms/raft.md).
5. The paper's optional KL penalty to the initial model is the velocity's distance to the reference, off by default.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from flowbench.algorithm import (
    COMMON_SEARCH_SPACE,
    Batch,
    Defaults,
    LogUniform,
    Loss,
    Rollout,
    register_algorithm,
)
from flowbench.models.flow import velocity_error
from flowbench.models.policy import Policy
from flowbench.toolkit.defaults import HAND_SEARCH, MINI_SD3_LORA, with_common
from flowbench.toolkit.matching import Matching, MatchingConfig, renoised


@register_algorithm("raft", paper="arXiv:2304.06767", needs={"endpoint"}, family="forward-process")
class Raft(Matching["Raft.Config"]):
    """Reward-ranked fine-tuning: flow matching on the best images of each prompt."""

    class Config(MatchingConfig):
        share: float = Field(0.25, gt=0, le=1, description="of a prompt's images that is kept, rounded up; paper: 1/K")
        alpha: float = Field(0.0, ge=0, description="weight of mean_d (v - v_ref)^2; paper: optional KL, off")

        def least_group(self) -> int:
            return 2

    cfg: Config
    metrics: ClassVar = {
        "kept": "mean reward of the kept images above their prompt's mean",
    }
    defaults: ClassVar = {
        "mini-sd3": with_common(
            "mini-sd3",
            "forward-process",
            {**MINI_SD3_LORA, "learning_rate": 4e-4},
            log=HAND_SEARCH,
            takes=("states_per_image",),
        ),
        # Images of the policy whose velocity is regressed: docs/guidance.md.
        "sd3.5-medium": Defaults({"guidance_scale": 1.0}),
    }
    search_space: ClassVar = {
        **COMMON_SEARCH_SPACE,
        "algorithm.share": LogUniform(0.025, 1.0),  # 0.25: the paper's best 1 of K in groups of 4; 1 keeps all
    }

    def prepare(self, rollout: Rollout) -> Batch:
        """Rows of the kept images; `advantage` is their reward above the mean of their prompt."""
        best_first = rollout.reward.argsort(descending=True, stable=True)
        order = best_first[rollout.group[best_first].argsort(stable=True)]  # prompt by prompt
        size, group = rollout.group.bincount(), rollout.group[order]
        rank = torch.arange(len(order), device=order.device) - (size.cumsum(0) - size)[group]
        kept = order[rank < torch.ceil(self.cfg.share * size[group])].sort().values
        copies = torch.arange(self.cfg.states_per_image, device=kept.device) * len(rollout)
        return self.rows(rollout, rollout.center(rollout.reward)).select((kept + copies[:, None]).flatten())

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        noisy = renoised(batch)
        v = policy.velocity(noisy.x, noisy.sigma, batch.cond)
        fit = velocity_error(v, noisy.u)
        loss, metrics = fit, {"fit": fit, "kept": batch.advantage}
        if self.cfg.alpha:
            w2 = velocity_error(v, policy.velocity(noisy.x, noisy.sigma, batch.cond, weights="reference"))
            loss, metrics["w2"] = loss + self.cfg.alpha * w2, w2
        return Loss(loss, metrics=metrics)
