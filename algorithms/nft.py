"""DiffusionNFT: negative-aware fine-tuning on the forward process (arXiv:2509.16117); v_old draws the images.

    r    = clip(A / advantage_clip / 2 + 1/2, 0, 1)
    v+   = (1 - beta) v_old + beta v,    v- = (1 + beta) v_old - beta v
    loss = advantage_clip / beta (r e(v+) + (1 - r) e(v-)) + kl mean_d (v - v_ref)^2
    e(w) = mean_d (w - u)^2, or adaptive: sigma mean_d (w - u)^2 / stopgrad(mean_d |w - u|), which is the squared error
           of x0 over its absolute error

The minimiser is v_old + E[(2 r - 1) (u - v_old) | x] / beta for the plain e: the step of ADRPO from v_old. Defaults are
those of the reference code (NVlabs/DiffusionNFT, config/nft.py: compositional reward and PickScore). v_old is renewed
from v, so that nothing anchors it but the pull of weight kl: under a reward without bound it follows the frontier
outward (docs/algorithms/nft.md).

Deviations from the paper and that code:
1. A is normalised by the prompt's mean and the iteration's standard deviation, as there, over this run's group size.
2. Samples come from the ODE sampler (Euler) instead of a second-order DPM solver; they are unguided if the run is.
3. Sigmas come from `training.sigma_distribution`, on SD3 from the sampler's own with replacement; the code visits 9 of
   its 10 once per image, in random order.
4. v_old moves once per iteration, its decay rising by `old_ramp` each time; the code counts optimizer steps, of which
   it makes one per iteration (two for OCR).
5. On mini-sd3 kl is 0.5: with the code's 1e-4 the velocity ran away.
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
from flowbench.toolkit.matching import MatchingConfig, Renoised, TrailingMatching, renoised


@register_algorithm("nft", paper="arXiv:2509.16117", needs={"endpoint", "old"}, family="forward-process")
class Nft(TrailingMatching["Nft.Config"]):
    """DiffusionNFT: contrasts an implicit positive and an implicit negative velocity around the sampling policy."""

    class Config(MatchingConfig):
        beta: float = Field(1.0, gt=0, description="strength of v in v+ and v-; reference code (0.1 for OCR)")
        advantage_clip: float = Field(5.0, gt=0, description="|A| that maps to r = 0 or 1; reference code")
        adaptive: bool = Field(True, description="error of x0 over its absolute error; reference code")
        kl: float = Field(1e-4, ge=0, description="pull to the reference; reference code")
        old_decay: float = Field(0.5, ge=0, lt=1, description="largest decay of v_old; reference code")
        old_ramp: float = Field(0.001, ge=0, description="growth of that decay per iteration; reference code")
        old_start: int = Field(0, ge=0, description="iterations before it grows; reference code (75 for OCR)")

        def least_group(self) -> int:
            return 2

    cfg: Config
    metrics: ClassVar = {
        "old_distance": "mean_d (v - v_old)^2",
    }
    defaults: ClassVar = {
        "mini-sd3": with_common(
            "mini-sd3",
            "forward-process",
            {"learning_rate": 2e-4},
            {"kl": 0.5},
            HAND_SEARCH,
            takes=("states_per_image",),
        ),
        # NVlabs/DiffusionNFT, config/nft.py, sd3_geneval and sd3_pickscore; its sampler is a second-order solver.
        "sd3.5-medium": Defaults(
            {
                "guidance_scale": 1.0,
                "sigma_distribution": "sampler",
                "minibatch": 10368,  # one optimizer step per iteration
                "ema": 0.9,  # scripts/train_nft_sd3.py: what its evaluation sees
            },
            {"beta": 1.0, "kl": 1e-4, "states_per_image": 9, "old_ramp": 0.001, "old_decay": 0.5},
        ),
    }
    search_space: ClassVar = {
        **COMMON_SEARCH_SPACE,
        "algorithm.beta": LogUniform(0.1, 10.0),  # 1: reference code (0.1 for OCR)
        "algorithm.kl": LogUniform(1e-5, 1e-3),  # 1e-4: reference code
    }

    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        policy.add_view("old")

    def prepare(self, rollout: Rollout) -> Batch:
        """Rows whose `advantage` is normalised and clipped."""
        return self.rows(rollout, rollout.normalized_advantage(self.cfg.advantage_clip))

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        beta, bound = self.cfg.beta, self.cfg.advantage_clip
        noisy = renoised(batch)
        v = policy.velocity(noisy.x, noisy.sigma, batch.cond)
        v_old = policy.velocity(noisy.x, noisy.sigma, batch.cond, weights="old")
        r = (batch.advantage / bound / 2 + 0.5).clamp(0, 1)
        positive = self.error((1 - beta) * v_old + beta * v, noisy)
        negative = self.error((1 + beta) * v_old - beta * v, noisy)
        loss = bound / beta * (r * positive + (1 - r) * negative)
        metrics = {"fit": velocity_error(v, noisy.u), "old_distance": velocity_error(v, v_old)}
        if self.cfg.kl:
            w2 = velocity_error(v, policy.velocity(noisy.x, noisy.sigma, batch.cond, weights="reference"))
            loss, metrics["w2"] = loss + self.cfg.kl * w2, w2
        return Loss(loss, metrics=metrics)

    def error(self, w: torch.Tensor, noisy: Renoised) -> torch.Tensor:
        """e(w), (R,)."""
        squared = velocity_error(w, noisy.u)
        if not self.cfg.adaptive:
            return squared
        absolute = noisy.sigma * (w - noisy.u).detach().abs().flatten(1).mean(1)
        return noisy.sigma**2 * squared / absolute.clamp_min(1e-5)

    def after_iteration(self, policy: Policy) -> None:
        self.trail(policy, "old", self.cfg.old_ramp, self.cfg.old_decay, self.cfg.old_start)
