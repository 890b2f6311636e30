"""AC-Flow: an actor-critic for flow matching (arXiv:2510.18072).

    r_s  = shape(r)
    V    = V_phi(x_sigma, sigma, c)                          regressed on r_s
    A    = clip(r_s - V, -c, c)
    w    = weight(A)
    loss = w mean_d (v - u)^2 + alpha mean_d (v - v_ref)^2   after the critic's warm-up

The paper's code and hyperparameters are not public: every default below is flowbench's own, chosen by measurement.

Deviations and choices where the source leaves them open:
1. States are re-noised samples by default, so that V* = E[r_s | x_sigma]; "trajectory" takes the sampler's own states.
2. The critic sees a summary of the text: the pooled embedding, or the mean of the tokens where a model has none.
3. The images of a prompt are re-noised with the same noise and sigma (`shared_noise`). Their centred advantages sum to
   about zero, so that most of the noise's part of the gradient cancels; the expectation is unchanged.
4. Weights may be centred over the batch (`center`). Positive weights whose mean is not zero also distil the model on
   its own discretised samples; at small budgets that drift is stronger than the signal.
5. `control_variate` subtracts w mean_d (v - v_ref)^2. For a true critic and linear weights E[w | x_sigma] = 0, so that
   the expectation is unchanged; the gradient becomes w (v_ref - u) + alpha (v - v_ref), whose noise does not grow with
   the distance from the reference, and with alpha > 0 every row has a minimum. ADRPO's adaptive weight does the same.
6. With `w2_every` n, the W2 term is measured on every n-th row, n times as heavy: the same expectation for an n-th of
   the reference's forward passes. Its gradient, alpha (v - v_ref), has no noise of u, so that a few rows tell it. Which
   rows they are is decided in `prepare`, over the whole iteration.
7. With `anchor_decay`, v_ref is a moving average of the policy, updated once per iteration (as in 2404.09656): the
   pull then bounds the policy's speed and not its distance, and the gain does not end where pull and signal balance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from flowbench.algorithm import (
    COMMON_SEARCH_SPACE,
    Algorithm,
    AlgorithmConfig,
    Batch,
    Choice,
    Compared,
    Defaults,
    Draws,
    LogUniform,
    Loss,
    Rollout,
    endpoints,
    register_algorithm,
    visited,
)
from flowbench.models.flow import velocity_error
from flowbench.models.policy import Policy
from flowbench.toolkit.critic import StateCritic, explained_by_sigma
from flowbench.toolkit.matching import renoised
from flowbench.toolkit.shaping import Kind, RewardShaping

Weighting = Literal["exp", "softplus", "sigmoid", "linear", "topk"]
WEIGHTS = {
    "exp": lambda a, tau: torch.exp(tau * a),
    "softplus": lambda a, tau: torch.nn.functional.softplus(tau * a),
    "sigmoid": lambda a, tau: torch.sigmoid(tau * a),
    "linear": lambda a, tau: tau * a,
    "topk": lambda a, tau: (a >= a.median()).float(),
}


@register_algorithm("acflow", paper="arXiv:2510.18072", needs={"endpoint", "states"})
class AcFlow(Algorithm["AcFlow.Config"]):
    """Actor-critic flow matching: a critic of intermediate states turns rewards into clipped, generalized weights."""

    class Config(AlgorithmConfig):
        added_later: ClassVar = frozenset({"anchor_decay", "w2_every"})

        shaping: Kind = Field("standardize", description="how rewards become r_s; see flowbench.toolkit.shaping")
        critic: Literal["shaped", "direct", "none"] = Field("shaped", description="learns r_s, raw r, or none (V = 0)")
        critic_loss: Literal["mse", "huber"] = Field("mse", description="error of the critic")
        critic_width: int = Field(64, ge=8, description="channels of the critic")
        states: Literal["renoised", "trajectory"] = Field("renoised", description="noised x0, or the sampler's states")
        states_per_image: int = Field(1, ge=1, description="noisy states per image and pass, for re-noised states")
        shared_noise: bool = Field(True, description="same noise and sigma for the images of a prompt")
        clip: float | None = Field(2.0, gt=0, description="bound on |A|; null is none")
        warmup: int = Field(5, ge=0, description="iterations in which only the critic learns")
        weight: Weighting = Field("linear", description="the generalized weighting of the advantage")
        tau: float = Field(1.0, gt=0, description="temperature of the weighting")
        center: bool = Field(True, description="subtract the batch mean of the weights")
        alpha: float = Field(1.0, ge=0, description="Wasserstein-2 regularisation")
        w2_every: int = Field(1, ge=1, description="measure the W2 term on every n-th row")
        anchor_decay: float | None = Field(None, ge=0, lt=1, description="v_ref is the policy's average of this decay")
        control_variate: bool = Field(False, description="subtract w mean_d (v - v_ref)^2 from the loss")

        def warmup_iterations(self) -> int:
            return 0 if self.critic == "none" else self.warmup

    cfg: Config
    # Found in runs of one to five seeds: docs/mini-sd3-search.md.
    defaults: ClassVar = {
        "mini-sd3": Defaults(
            {"learning_rate": 3e-4, "minibatch": 128, "auxiliary_steps": 1, "ema": 0.97},
            {
                "shaping": "normalize",
                "states_per_image": 4,
                "alpha": 1.0,
                "w2_every": 4,
                "anchor_decay": 0.95,
                "warmup": 3,
            },
            by_reward={
                # The truth cannot be over-optimised: more images, from the sampler that is evaluated.
                "oracle": Defaults(
                    {
                        "images": 15360,
                        "num_steps": 10,
                        "minibatch": 256,
                        "prompts_per_iteration": 16,
                        "auxiliary_steps": 3,
                        "ema": 0.98,
                    },
                    {"alpha": 2.0, "w2_every": 1},
                )
            },
        )
    }
    search_space: ClassVar = {
        **COMMON_SEARCH_SPACE,
        "algorithm.critic": Choice(("shaped", "direct", "none")),  # all that there are
        "algorithm.alpha": LogUniform(0.1, 10.0),  # 1: ORW-CFM-W2's code, same term; the paper's is not public
    }
    ablations: ClassVar = ({"clip": None}, {"warmup": 0}, {"shaping": "none"}, {"alpha": 0.0}, {"critic": "direct"})

    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        self.shape = RewardShaping("none" if self.cfg.critic == "direct" else self.cfg.shaping)
        self.warming_up = False
        self.anchor = "reference" if self.cfg.anchor_decay is None else "average"
        if self.anchor == "average":
            policy.add_view("average")
        if self.cfg.critic != "none":
            torch.manual_seed(0)
            channels, *sides = policy.latent_shape
            self.critic = StateCritic(channels, policy.text_width, self.cfg.critic_width, min(sides))

    def needs(self) -> frozenset[str]:
        return self.info.needs if self.cfg.states == "trajectory" else frozenset({"endpoint"})

    def draws(self) -> Draws:
        fresh = self.cfg.states == "renoised"
        return Draws(noises=int(fresh), sigma=fresh, shared=self.cfg.shared_noise)

    def prepare(self, rollout: Rollout) -> Batch:
        """Rows whose `advantage` is the critic's target r_s; the advantage itself depends on the state."""
        self.warming_up = rollout.iteration < self.cfg.warmup and self.cfg.critic != "none"
        shaped = self.shape(rollout)
        batch = endpoints(rollout, shaped, copies=self.cfg.states_per_image)
        if self.cfg.states == "trajectory":
            batch = visited(rollout, shaped, self.policy.draw_integers(len(rollout.sigmas) - 1, len(rollout)))
        row = torch.arange(len(batch), device=shaped.device)
        # Each copy of the images has the W2 term on other images, and each image in one of n copies.
        anchored = ((row % len(rollout) + row // len(rollout)) % self.cfg.w2_every == 0).to(shaped.dtype)
        return replace(batch, scalars={"anchored": anchored / anchored.mean()})

    def measure(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        if self.cfg.critic == "none":
            return {"target": batch.advantage, "value": torch.zeros_like(batch.advantage)}
        x, sigma, _ = self._state(batch)
        return {"target": batch.advantage, "value": self._value(x, sigma, batch), "sigma": sigma}

    def compare(self, scalars: Mapping[str, torch.Tensor]) -> Compared:
        """Each row's weight w."""
        value, target = scalars["value"], scalars["target"]
        metrics = explained_by_sigma(value, target, scalars["sigma"]) if "sigma" in scalars else {}
        if self.warming_up:
            return Compared(metrics=metrics)
        advantage, bound = target - value, self.cfg.clip
        if bound is not None:
            metrics["clipped"] = (advantage.abs() > bound).float().mean()
            advantage = advantage.clamp(-bound, bound)
        w = WEIGHTS[self.cfg.weight](advantage, self.cfg.tau)
        metrics["effective_sample_size"] = w.abs().sum() ** 2 / (len(w) * w.square().sum().clamp_min(1e-12))
        return Compared({"weight": w - w.mean() if self.cfg.center else w}, metrics)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        x, sigma, u = self._state(batch)
        critic_loss = self.auxiliary_loss(policy, batch)
        metrics = {} if critic_loss is None else {"critic_loss": critic_loss}
        if self.warming_up:
            return Loss(None, critic_loss, metrics)
        w, anchored = batch.scalars["weight"], batch.scalars["anchored"]
        v = policy.velocity(x, sigma, batch.cond)
        fit = velocity_error(v, u)
        loss, metrics["fit"] = w * fit, fit
        some = anchored.nonzero()[:, 0]
        if (self.cfg.alpha or self.cfg.control_variate) and len(some):
            v_ref = policy.velocity(x[some], sigma[some], batch.cond.select(some), weights=self.anchor)
            w2 = velocity_error(v[some], v_ref)
            pull = self.cfg.alpha - w[some] if self.cfg.control_variate else self.cfg.alpha
            loss, metrics["w2"] = loss.index_add(0, some, anchored[some] * (pull * w2)), w2
        return Loss(loss, critic_loss, metrics)

    def auxiliary_loss(self, policy: Policy, batch: Batch) -> torch.Tensor | None:
        if self.cfg.critic == "none":
            return None
        x, sigma, _ = self._state(batch)
        error = torch.nn.functional.mse_loss if self.cfg.critic_loss == "mse" else torch.nn.functional.huber_loss
        return error(self._value(x, sigma, batch), batch.advantage, reduction="none")

    def after_iteration(self, policy: Policy) -> None:
        if self.cfg.anchor_decay is not None:
            policy.update_view("average", self.cfg.anchor_decay)

    def networks(self) -> dict[str, torch.nn.Module]:
        return {} if self.cfg.critic == "none" else {"critic": self.critic}

    def state_dict(self) -> dict[str, Any]:
        return {"shaping": dict(self.shape.running)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shape.running = dict(state["shaping"])

    def _state(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_sigma, sigma and the target velocity of the straight path that joins x_sigma to its x0."""
        if self.cfg.states == "renoised":
            noisy = renoised(batch)
            return noisy.x, noisy.sigma, noisy.u
        x, sigma = batch.state()
        return x, sigma, (x - batch.x0) / sigma[:, None, None, None]

    def _value(self, x: torch.Tensor, sigma: torch.Tensor, batch: Batch) -> torch.Tensor:
        value: torch.Tensor = self.critic(x.detach(), sigma, self.policy.text_summary(batch.cond))
        return value
