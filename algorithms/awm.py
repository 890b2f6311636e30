"""AWM: advantage weighted matching (arXiv:2509.25050).

    logp = -mean_d (v - u)^2, or the generalised Huber form -sigma ((mean_d (v - u)^2 + 1e-10)^p - 1e-10^p) / p
    rho  = exp(logp - logp_old)                       same noise and sigma for both
    loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps))
           + beta mean_d (v - v_ref)^2 + beta_average mean_d (v - v_average)^2

Defaults are those of the reference code's SD3.5 compositional run (scxue/advantage_weighted_matching,
config/dgx_awm.py, geneval_sd3_no_cfg). Nothing anchors it but the pull of weight beta: under a reward without bound it
follows the frontier outward (docs/algorithms/awm.md).

Deviations from the paper and that code:
1. logp_old is that of the weights at the iteration's start, evaluated beside logp; the code stores it beforehand, and
   takes logp itself where an iteration has one optimizer step. The paper reports p = 1 without sigma ("Uniform") as
   best, the code's default is the Huber form: `power` null or 0.25.
2. Sigmas come from `training.sigma_distribution`, on SD3 from all the sampler's steps. The code draws one from each of
   6 strata of steps 1 to 11 of 14, the same for a whole batch: it leaves out sigma 1 and the last two steps (for
   PickScore only these two).
3. Samples come from the ODE sampler instead of SA-Solver.
4. The average's decay rises by `average_ramp` per iteration; the code counts optimizer steps, of which it makes one per
   iteration in these runs.
5. On mini-sd3 beta stays at 0.003, the code's weight for OCR, with which its settings were found.
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
from flowbench.toolkit.defaults import HAND_SEARCH, with_common
from flowbench.toolkit.matching import MatchingConfig, TrailingMatching, renoised
from flowbench.toolkit.policy_gradient import clipped_surrogate


@register_algorithm("awm", paper="arXiv:2509.25050", needs={"endpoint"}, family="forward-process")
class Awm(TrailingMatching["Awm.Config"]):
    """Advantage weighted matching: a clipped policy gradient whose log-probability is the flow-matching loss."""

    class Config(MatchingConfig):
        clip_range: float = Field(1.0, gt=0, description="eps; reference code")
        advantage_clip: float = Field(5.0, gt=0, description="bound on |A| before it is scaled to 1; reference code")
        power: float | None = Field(0.25, gt=0, description="of the generalised Huber form; null is plain; reference")
        beta: float = Field(
            0.001, ge=0, description="pull to the reference; reference code, compositional reward (0.003 for OCR)"
        )
        beta_average: float = Field(1.0, ge=0, description="pull to the average of past weights; reference code")
        average_decay: float = Field(0.3, ge=0, lt=1, description="largest decay of the average; reference code")
        average_ramp: float = Field(0.001, gt=0, description="growth of that decay per iteration; reference code")

        def least_group(self) -> int:
            return 2

    cfg: Config
    metrics: ClassVar = {
        "lag": "mean_d (v - v_average)^2",
    }
    defaults: ClassVar = {
        "mini-sd3": with_common(
            "mini-sd3",
            "forward-process",
            {"learning_rate": 2e-4},
            {"beta": 0.003},
            HAND_SEARCH,
            takes=("states_per_image",),
        ),
        # scxue/advantage_weighted_matching, config/dgx_awm.py, geneval_sd3_no_cfg (beta: OCR 0.003, PickScore 1e-4).
        "sd3.5-medium": Defaults(
            {
                "num_steps": 14,
                "guidance_scale": 1.0,
                "prompts_per_iteration": 72,
                "sigma_distribution": "sampler",
                "minibatch": 10368,  # one optimizer step per iteration
                "ema": 0.99,
            },
            {"beta": 0.001, "beta_average": 1.0, "power": 0.25, "states_per_image": 6},
        ),
    }
    search_space: ClassVar = {
        **COMMON_SEARCH_SPACE,
        "algorithm.beta": LogUniform(1e-4, 1e-2),  # 0.001: reference code, compositional reward
        "algorithm.beta_average": LogUniform(0.1, 10.0),  # 1: reference code
    }

    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        policy.add_view("old")
        if self.cfg.beta_average:
            policy.add_view("average")

    def prepare(self, rollout: Rollout) -> Batch:
        """Rows whose `advantage` is normalised, clipped and scaled to [-1, 1]."""
        self.policy.update_view("old", decay=0.0)
        return self.rows(rollout, rollout.normalized_advantage(self.cfg.advantage_clip) / self.cfg.advantage_clip)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        noisy = renoised(batch)
        v = policy.velocity(noisy.x, noisy.sigma, batch.cond)
        error = velocity_error(v, noisy.u)
        old_error = velocity_error(policy.velocity(noisy.x, noisy.sigma, batch.cond, weights="old"), noisy.u)
        log_ratio = self.log_prob(error, noisy.sigma) - self.log_prob(old_error, noisy.sigma)
        loss, metrics = clipped_surrogate(batch.advantage, log_ratio, self.cfg.clip_range)
        metrics["fit"] = error
        for name, view, weight in (
            ("w2", "reference", self.cfg.beta),
            ("lag", "average", self.cfg.beta_average),
        ):
            if weight:
                distance = velocity_error(v, policy.velocity(noisy.x, noisy.sigma, batch.cond, weights=view))
                loss, metrics[name] = loss + weight * distance, distance
        return Loss(loss, metrics=metrics)

    def log_prob(self, error: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The surrogate log-probability (R,) of rows with this mean squared velocity error (R,)."""
        power, tiny = self.cfg.power, 1e-10
        if power is None:
            return -error
        return -sigma * ((error + tiny) ** power - tiny**power) / power

    def after_iteration(self, policy: Policy) -> None:
        if self.cfg.beta_average:
            self.trail(policy, "average", self.cfg.average_ramp, self.cfg.average_decay)
