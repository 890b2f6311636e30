"""Online DPO: Diffusion-DPO on pairs that the model has just drawn (arXiv:2311.12908, in velocity form).

    x_w, x_l = the best and the worst of a prompt's images, noised with the same eps and sigma
    e(x)     = mean_d (v - u)^2 - mean_d (v_ref - u)^2
    loss     = -log sigmoid(-beta / 2 (e(x_w) - e(x_l)))

Deviations from the paper and its reference code (SalesforceAIResearch/DiffusionDPO):
1. Pairs come from the current model and the run's reward instead of a data set of human choices. Prompts whose images
   all score the same have no pair: their row has weight 0.
2. The error is that of the velocity; the noise's error is (1 - sigma) times it, so that sigmas are weighted otherwise.
3. beta is 100, that of Flow-GRPO's DPO baseline on SD3.5 (yifan123/flow_grpo, config/dpo.py), which has the same
   velocity form; the paper's 2000 to 5000 belong to the noise's error on Stable Diffusion 1.5 and XL. The factor 1/2
   and means over dimensions are those of both codes.
4. The reference stays the model before tuning, and the current one draws the images; in Flow-GRPO's baseline the
   reference draws them, and its online variant renews the reference every 40 steps.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from flowbench.algorithm import (
    COMMON_SEARCH_SPACE,
    Algorithm,
    AlgorithmConfig,
    Batch,
    Defaults,
    Draws,
    LogUniform,
    Loss,
    Rollout,
    pairs,
    register_algorithm,
)
from flowbench.models.flow import velocity_error
from flowbench.models.policy import Policy
from flowbench.toolkit.defaults import HAND_SEARCH, with_common
from flowbench.toolkit.matching import renoised


@register_algorithm("online-dpo", paper="arXiv:2311.12908", needs={"endpoint"}, family="preference")
class OnlineDpo(Algorithm["OnlineDpo.Config"]):
    """Diffusion-DPO in velocity form on the best and the worst image of each prompt."""

    class Config(AlgorithmConfig):
        beta: float = Field(100.0, gt=0, description="KL penalty; Flow-GRPO's DPO baseline")
        states_per_pair: int = Field(1, ge=1, description="noisy states per pair and pass")

        def least_group(self) -> int:
            return 2

    cfg: Config
    metrics: ClassVar = {
        "accuracy": "share of rows with logit above 0",
        "logit": "mean logit",
        "better": "mean error of the better images",
        "worse": "mean error of the worse images",
        "pairs": "share of rows whose two images differ in reward",
    }
    defaults: ClassVar = {
        "mini-sd3": with_common(
            "mini-sd3", "preference", {"learning_rate": 2e-4}, log=HAND_SEARCH, takes=("states_per_pair",)
        ),
        # yifan123/flow_grpo, config/dpo.py, geneval_sd3 and pickscore_sd3.
        "sd3.5-medium": Defaults(
            {
                "num_steps": 40,
                "minibatch": 1872,  # one optimizer step per iteration
                "ema": 0.987,  # 0.9 every 8 optimizer steps
            },
            {"beta": 100.0, "states_per_pair": 39},
        ),
    }
    search_space: ClassVar = {
        **COMMON_SEARCH_SPACE,
        "algorithm.beta": LogUniform(10.0, 1000.0),  # 100: Flow-GRPO's DPO baseline
    }

    def draws(self) -> Draws:
        """Both images of a pair are noised with the same; rows of a prompt are copies of one pair."""
        return Draws(noises=1, sigma=True, fixed=True)

    def prepare(self, rollout: Rollout) -> Batch:
        """One row per prompt and state; `advantage` is the difference of the pair's rewards."""
        return pairs(rollout, copies=self.cfg.states_per_pair)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        pair = [renoised(batch, x0) for x0 in batch.pair()]
        x, sigma, u = (torch.cat(parts) for parts in zip(*((n.x, n.sigma, n.u) for n in pair), strict=True))
        cond = batch.cond.select(torch.arange(len(batch), device=x.device).repeat(2))
        error = velocity_error(policy.velocity(x, sigma, cond), u)
        error_ref = velocity_error(policy.velocity(x, sigma, cond, weights="reference"), u)
        better, worse = (error - error_ref).chunk(2)
        logit = -self.cfg.beta / 2 * (better - worse)
        differs = (batch.advantage > 0).float()
        loss = -torch.nn.functional.logsigmoid(logit) * differs
        metrics = {"accuracy": (logit > 0).float(), "logit": logit, "better": better}
        return Loss(loss, metrics={**metrics, "worse": worse, "pairs": differs})
