"""ORW-CFM-W2: online reward-weighted flow matching with Wasserstein-2 regularisation (arXiv:2502.06061).

    w    = exp(tau r) / Z,   Z = mean of exp(tau r) over the iteration's images, or 1 (`normalize=none`)
    loss = w mean_d (v - u)^2 + alpha mean_d (v - v_ref)^2

The paper's theory has q_N proportional to w q_{N-1}: it fixes w up to a constant, which only alpha feels. With Z the
samples weigh 1 against alpha, whatever their reward. Without it, under a reward without bound, every gain makes all
weights grow and alpha vanish beside them: on the analytic models with tau 1 and alpha 1 the path has no end. The
reference's own reward cannot do that: it is a difference of two probabilities, so that its w lies in 0.61 to 1.65.

Deviations from the paper and its reference code (markerthu/orw-cfm, finetune_fm.py):
1. The paper's t runs from noise to data; here sigma = 1 - t.
2. tau 0.5 and alpha 1.0 are the code's, for CIFAR and a reward in [-1, 1]. Rewards are not normalised, as there.
3. Weights are divided by their mean, for the reason above; the code takes them as they are.
4. Noise and images are paired independently. The code pairs them by minibatch optimal transport, which reorders the
   images but not the weights, so that a weight meets another image.
5. The code draws t uniformly, as here on the analytic models; elsewhere sigmas come from
   `training.sigma_distribution`, logit-normal by default.
6. Images come from the current policy, new in each iteration; the code's come from a copy of it that is renewed every
   10,000 optimizer steps, with new images in each step.
7. The code warms its learning rate up over 5,000 steps, longer than a run here; there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from flowbench.algorithm import (
    COMMON_SEARCH_SPACE,
    Algorithm,
    Batch,
    Defaults,
    Draws,
    LogUniform,
    Loss,
    Rollout,
    endpoints,
    register_algorithm,
)
from flowbench.models.flow import velocity_error
from flowbench.models.policy import Policy
from flowbench.toolkit.defaults import HAND_SEARCH, MINI_SD3_LORA, with_common
from flowbench.toolkit.matching import MatchingConfig, renoised

PLANE: Mapping[str, Any] = {"sigma_distribution": "uniform", "epochs": 8, "ema": 0.98}


@register_algorithm("orw-cfm-w2", paper="arXiv:2502.06061", needs={"endpoint"}, family="forward-process")
class OrwCfmW2(Algorithm["OrwCfmW2.Config"]):
    """Online reward-weighted flow matching with Wasserstein-2 regularisation."""

    class Config(MatchingConfig):
        added_later: ClassVar = frozenset({"states_per_image"})

        tau: float = Field(0.5, gt=0, description="inverse temperature of exp(tau r); reference code, CIFAR")
        alpha: float = Field(1.0, ge=0, description="Wasserstein-2 regularisation; reference code, CIFAR")
        normalize: Literal["none", "iteration"] = Field(
            "iteration", description="weights as they are, or over their mean in the iteration; reference code: none"
        )

    cfg: Config
    anchored: ClassVar = True
    metrics: ClassVar = {
        "weight": "mean of w",
    }
    defaults: ClassVar = {
        "mini-sd3": with_common(
            "mini-sd3",
            "forward-process",
            {**MINI_SD3_LORA, "learning_rate": 2e-3},
            log=HAND_SEARCH,
            takes=("states_per_image",),
        ),
        # Images of the policy whose velocity is regressed: docs/guidance.md.
        "sd3.5-medium": Defaults({"guidance_scale": 1.0}),
        # Fresh noise in 8 passes: the regression comes near its minimiser in each iteration, and the path near its end
        # within the budget. Sigmas are uniform as in the reference code.
        "gaussian": Defaults({**PLANE, "learning_rate": 3e-3}),
        "mixture": Defaults({**PLANE, "learning_rate": 1e-3}),
    }
    search_space: ClassVar = {
        **COMMON_SEARCH_SPACE,
        "algorithm.tau": LogUniform(0.05, 5.0),  # 0.5: reference code, CIFAR
        "algorithm.alpha": LogUniform(0.1, 10.0),  # 1: reference code, CIFAR
    }

    def draws(self) -> Draws:
        return Draws(noises=1, sigma=True)

    def prepare(self, rollout: Rollout) -> Batch:
        """Rows whose `advantage` is the reward; normalised: less log(mean exp(tau r)) / tau, so that w has mean 1."""
        advantage, tau = rollout.reward, self.cfg.tau
        if self.cfg.normalize == "iteration":
            advantage = advantage - ((tau * advantage).logsumexp(0) - math.log(len(rollout))) / tau
        return endpoints(rollout, advantage, copies=self.cfg.states_per_image)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        noisy = renoised(batch)
        w = torch.exp(self.cfg.tau * batch.advantage)
        v = policy.velocity(noisy.x, noisy.sigma, batch.cond)
        fit = velocity_error(v, noisy.u)
        loss, metrics = w * fit, {"fit": fit, "weight": w}
        if self.cfg.alpha:
            w2 = velocity_error(v, policy.velocity(noisy.x, noisy.sigma, batch.cond, weights="reference"))
            loss, metrics["w2"] = loss + self.cfg.alpha * w2, w2
        return Loss(loss, metrics=metrics)
