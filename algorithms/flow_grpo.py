"""Flow-GRPO: group relative policy optimisation with a stochastic flow sampler (arXiv:2505.05470).

    A    = (r - mean of the prompt's images) / std
    rho  = p_theta(x' | x, sigma, c) / p_old(x' | x, sigma, c)
    KL   = mean_d (mu - mu_ref)^2 / (2 std^2 |d|),    d = sigma' - sigma
    loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + beta KL

Defaults are those of the reference code (yifan123/flow_grpo, general_ocr_sd3 and geneval_sd3).

Deviations from the paper and that code:
1. The standard deviation is that of the whole iteration, as in the code's SD3 runs (`global_std`); the paper's is that
   of the prompt's images.
2. As in the code, ratio and KL are means over latent dimensions, hence the small clip range.
3. The code omits |d| from the KL, which is then smaller by that factor: 0.1 on average with 10 steps. The KL here is
   the paper's and the exact one; `kl_over_step=false` gives the code's, to which its published beta belongs.
4. The code leaves out the last sampler step (`timestep_fraction` 0.99), here it is left out where it changes nothing:
   on the schedulers' own grids (docs/sampling.md).
MixGRPO (2507.21802) is this algorithm with `training.sde_window`: stochastic steps, and the loss, in that window only.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from flowbench.algorithm import Batch, Defaults, LogUniform, Loss, register_algorithm
from flowbench.models.policy import Policy
from flowbench.toolkit.policy_gradient import (
    STEP_DEFAULTS,
    STEP_SEARCH_SPACE,
    StepConfig,
    StepPolicyGradient,
    clipped_surrogate,
)


@register_algorithm("flow-grpo", paper="arXiv:2505.05470", needs={"states", "log_prob"})
class FlowGrpo(StepPolicyGradient["FlowGrpo.Config"]):
    """Group relative policy optimisation over the steps of a stochastic flow sampler."""

    class Config(StepConfig):
        beta: float = Field(0.04, ge=0, description="weight of the KL; reference code (0.01 for PickScore)")
        kl_over_step: bool = Field(
            True, description="the paper's exact KL; false omits |d|, as the reference code does"
        )

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

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        step, log_ratio = self.replay(policy, batch)
        loss, metrics = clipped_surrogate(batch.advantage, log_ratio, self.cfg.clip_range)
        if self.cfg.beta:
            kl = self.divergence(policy, batch, step) / batch.x0[0].numel()
            if not self.cfg.kl_over_step:
                taken = batch.transition()
                kl = kl * (taken.sigma - taken.sigma_next)
            loss, metrics["kl"] = loss + self.cfg.beta * kl, kl
        return Loss(loss, metrics=metrics)
