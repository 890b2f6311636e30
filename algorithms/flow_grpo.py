"""Flow-GRPO: group relative policy optimisation with a stochastic flow sampler (arXiv:2505.05470).

    A    = (r - mean of the prompt's images) / (std + 1e-4)
    rho  = p_theta(x' | x, sigma, c) / p_old(x' | x, sigma, c)
    KL   = mean_d (mu - mu_ref)^2 / (2 std^2),    std the sampler's diffusion coefficient
    loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + beta KL

The reference code is yifan123/flow_grpo, commit ac4c86e8; defaults are those of config/grpo.py, general_ocr_sd3 and
geneval_sd3. As there:
- The standard deviation is that of the whole iteration (`global_std`); false gives the paper's, of the prompt's images.
  Deviations are the population's (flow_grpo/stat_tracking.py).
- Images of zero advantage are not trained on (scripts/train_sd3.py), where others have one.
- Ratio and KL are means over latent dimensions, hence the small clip range.
- The KL of a Flow-SDE step lacks the division by |d|, d = sigma' - sigma, that the exact KL has: it is smaller by that
  factor, 0.1 on average with 10 steps, and the published beta belongs to it. `kl_over_step=true` gives the paper's.
  With `training.sampler=cps` it is mean_d (mu - mu_ref)^2, as in Flow-CPS, and with dance-sde the exact KL, either way.

Deviations from the paper and that code:
1. The code leaves out the last sampler step (`timestep_fraction` 0.99), here it is left out where it changes nothing:
   on the schedulers' own grids (docs/sampling.md). `training.sde_window` leaves it out too.
2. The code keeps as many images of zero advantage as fill its last batch; here none, unless all are of zero advantage.
MixGRPO (2507.21802) is this algorithm with `training.sde_window`: stochastic steps, and the loss, in that window only.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from flowbench.algorithm import Batch, Defaults, LogUniform, Loss, Rollout, register_algorithm
from flowbench.models.policy import Policy
from flowbench.toolkit.advantages import group_advantages
from flowbench.toolkit.policy_gradient import (
    STEP_DEFAULTS,
    STEP_SEARCH_SPACE,
    StepConfig,
    StepPolicyGradient,
    clipped_surrogate,
)


@register_algorithm("flow-grpo", paper="arXiv:2505.05470", needs={"states", "log_prob"}, family="policy-gradient")
class FlowGrpo(StepPolicyGradient["FlowGrpo.Config"]):
    """Group relative policy optimisation over the steps of a stochastic flow sampler."""

    class Config(StepConfig):
        beta: float = Field(0.04, ge=0, description="weight of the KL; reference code (0.01 for PickScore)")
        kl_over_step: bool = Field(
            False, description="the paper's exact KL of Flow-SDE; false omits 1 / |d|, as the reference code does"
        )
        global_std: bool = Field(
            True, description="advantages over the iteration's deviation, as the code's SD3 runs; false is the prompt's"
        )

        def least_group(self) -> int:
            return 2

    cfg: Config
    defaults: ClassVar = {
        **STEP_DEFAULTS,
        # yifan123/flow_grpo, config/grpo.py, geneval_sd3 and general_ocr_sd3 (pickscore_sd3 has beta 0.01).
        "sd3.5-medium": Defaults(
            {
                "minibatch": 5184,  # two optimizer steps per iteration, of nine of the ten sampler steps
                "ema": 0.987,  # 0.9 every 8 optimizer steps
            },
            {"beta": 0.04, "kl_over_step": False, "clip_range": 1e-4, "advantage_clip": 5.0},
        ),
    }
    search_space: ClassVar = {
        **STEP_SEARCH_SPACE,
        "algorithm.beta": LogUniform(0.004, 0.4),  # 0.04: reference code (0.01 for PickScore)
    }

    def advantages(self, rollout: Rollout) -> torch.Tensor:
        return group_advantages(rollout, self.cfg.global_std, self.cfg.advantage_clip)

    def prepare(self, rollout: Rollout) -> Batch:
        """Transitions of the images whose advantage is not zero."""
        batch = super().prepare(rollout)
        rows = batch.advantage.nonzero()[:, 0]
        return batch.select(rows) if len(rows) else batch

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        step, log_ratio = self.replay(policy, batch)
        loss, metrics = clipped_surrogate(batch.advantage, log_ratio, self.cfg.clip_range)
        if self.cfg.beta:
            kl = self.divergence(policy, batch, step) / batch.x0[0].numel()
            if not self.cfg.kl_over_step:
                taken = batch.transition()
                kl = kl * policy.sampler.code_factor(taken.sigma, taken.sigma_next)
            loss, metrics["kl"] = loss + self.cfg.beta * kl, kl
        return Loss(loss, metrics=metrics)
