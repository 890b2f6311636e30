"""DPOK: policy gradient with a learned value and KL regularisation (arXiv:2305.16381, the online variant KL-O).

    r_s  = (r - running mean) / running deviation, of all prompts
    V    = V_phi(x, c, step)                                                   regressed on r_s
    A    = r_s - V
    rho  = p_theta(x' | x, sigma, c) / p_old(x' | x, sigma, c)
    KL   = KL(p_theta(. | x, sigma, c) || p_ref(. | x, sigma, c)) = |mu - mu_ref|^2 / (2 std^2)      per step, exact
    loss = -A clip(rho, 1 - eps, 1 + eps) + beta KL / D                 and, for phi alone, (V - r_s)^2

Both terms are divided by the number of latent dimensions D, so that the objective is E[A] - beta sum of KL, in nats.

The reference code is google-research/dpok, train_online_pg.py, commit 1d49f2c0. As there: the advantage is not compared
with other images of the prompt, but with what a small network makes of state, text and step (reward_model.py,
ValueMulti); the ratio is clipped on both sides whatever the sign of A (PPO's form is the minimum of both); it and the
KL are means over latent dimensions.

Deviations from the paper and that code:
1. The stochastic sampler is Flow-SDE (2505.05470) instead of DDIM with eta 1, since the model is a flow.
2. The code replaces the KL by the mean squared difference of the two noise predictions; here it is the paper's KL. With
   `training.sampler=cps` it is that sampler's own divergence, |mu - mu_ref|^2.
3. The code weighs the raw reward by 100 and the KL by 0.01; here the reward is standardised, so that `beta` is a price
   in deviations of the reward whatever the reward, and V has a target of scale 1.
4. |A| is bounded, as in DDPO; the code has no bound.
5. Policy and value learn from the transitions of the current rollout. The code draws both from a buffer of the last
   1,000 transitions, and takes one step of the value (5 batches of 256) before 5 of the policy.
6. The value starts at 0 and sees a normalised text summary; the code's starts at random and sees CLIP's embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field

from flowbench.algorithm import Batch, Compared, Defaults, LogUniform, Loss, Rollout, register_algorithm
from flowbench.models.policy import Policy
from flowbench.toolkit.critic import explained_variance
from flowbench.toolkit.defaults import OWN_NETWORKS
from flowbench.toolkit.policy_gradient import STEP_DEFAULTS, STEP_SEARCH_SPACE, StepConfig, StepPolicyGradient
from flowbench.toolkit.shaping import RewardShaping
from flowbench.toolkit.value import StepValue

# OWN_NETWORKS: the code's value takes one step per rollout, of 1e-4, in runs of 2,000 rollouts. Runs here have a
# hundred steps of the policy: the value takes one beside each of them, on its rows, of the core's 1e-3. More would fit
# the same few images.


@register_algorithm("dpok", paper="arXiv:2305.16381", needs={"states", "log_prob"}, family="policy-gradient")
class Dpok(StepPolicyGradient["Dpok.Config"]):
    """Policy gradient over the sampler's steps with a learned value, and the exact KL of each step to the reference."""

    class Config(StepConfig):
        beta: float = Field(0.01, ge=0, description="weight of the KL in nats; reference code's kl_weight")
        value: bool = Field(True, description="subtract a learned value of state, text and step; reference's v_flag")

    cfg: Config
    metrics: ClassVar = {
        "kl": "exact KL per step, in nats",
        "explained_variance": "share of the rewards' variance that V explains",
        "value_loss": "mean squared error of V, in deviations of the reward",
    }
    defaults: ClassVar = {
        **{
            model: Defaults({**settings.training, **OWN_NETWORKS}, settings.algorithm, settings.log)
            for model, settings in STEP_DEFAULTS.items()
        },
        # train_online_pg.py, v_lr: here too a run has thousands of steps.
        "sd3.5-medium": Defaults({**OWN_NETWORKS, "auxiliary_learning_rate": 1e-4}),
    }
    search_space: ClassVar = {
        **STEP_SEARCH_SPACE,
        "algorithm.beta": LogUniform(1e-3, 0.1),  # 0.01: reference code's kl_weight
    }
    ablations: ClassVar = ({"value": False}, {"beta": 0.0})

    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        self.shape = RewardShaping("standardize")
        if self.cfg.value:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.critic = StepValue(policy.latent_shape, policy.text_width, policy.num_steps)

    def advantages(self, rollout: Rollout) -> torch.Tensor:
        """The value's target r_s; the advantage itself depends on the state."""
        return self.shape(rollout)

    def prepare(self, rollout: Rollout) -> Batch:
        batch = super().prepare(rollout)
        step = (batch.transition().sigma[:, None] == rollout.sigmas).int().argmax(1)
        return replace(batch, scalars={"step": step.to(batch.advantage.dtype)})

    def measure(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        value = self._value(policy, batch) if self.cfg.value else torch.zeros_like(batch.advantage)
        return {"target": batch.advantage, "value": value}

    def compare(self, scalars: Mapping[str, torch.Tensor]) -> Compared:
        """Each row's advantage A, and for the log how much of the rewards the value explains."""
        value, target, bound = scalars["value"], scalars["target"], self.cfg.advantage_clip
        learns = self.cfg.value and len(value) > 2
        metrics = {"explained_variance": explained_variance(value, target)} if learns else {}
        return Compared({"advantage": (target - value).clamp(-bound, bound)}, metrics)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        step, log_ratio = self.replay(policy, batch)
        rho, eps = log_ratio.exp(), self.cfg.clip_range
        loss = -batch.scalars["advantage"] * rho.clamp(1 - eps, 1 + eps)
        metrics = {"clipped": ((rho - 1).abs() > eps).float(), "log_ratio": log_ratio}
        if self.cfg.beta:
            kl = self.divergence(policy, batch, step)
            loss, metrics["kl"] = loss + self.cfg.beta * kl / batch.x0[0].numel(), kl
        value_loss = self.auxiliary_loss(policy, batch)
        if value_loss is not None:
            metrics["value_loss"] = value_loss
        return Loss(loss, value_loss, metrics)

    def auxiliary_loss(self, policy: Policy, batch: Batch) -> torch.Tensor | None:
        return (self._value(policy, batch) - batch.advantage).square() if self.cfg.value else None

    def networks(self) -> dict[str, torch.nn.Module]:
        return {"value": self.critic} if self.cfg.value else {}

    def state_dict(self) -> dict[str, Any]:
        return {"shaping": dict(self.shape.running)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shape.running = dict(state["shaping"])

    def _value(self, policy: Policy, batch: Batch) -> torch.Tensor:
        x, _ = batch.state()
        value: torch.Tensor = self.critic(x.detach(), policy.text_summary(batch.cond), batch.scalars["step"])
        return value
