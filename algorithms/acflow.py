"""AC-Flow: an actor-critic for flow matching (arXiv:2510.18072).

    r_s  = shape(r)
    V    = V_phi(x_sigma, sigma, c)                          regressed on r_s
    A    = clip(r_s - V, -c, c)
    w    = weight(A)
    loss = w mean_d (v - u)^2 + alpha mean_d (v - v_ref)^2   after the critic's warm-up

The paper's code and hyperparameters are not public: every default below is flowbench's own, chosen by measurement.

Deviations and choices where the source leaves them open:
1. States are re-noised samples by default, so that V* = E[r_s | x_sigma]; "trajectory" takes the sampler's own states.
2. The critic sees the pooled text embedding.
3. The images of a prompt are re-noised with the same noise and sigma (`shared_noise`). Their centred advantages sum to
   about zero, so that most of the noise's part of the gradient cancels; the expectation is unchanged.
4. Weights may be centred over the batch (`center`). Positive weights whose mean is not zero also distil the model on
   its own discretised samples; at small budgets that drift is stronger than the signal.
5. `control_variate` subtracts w mean_d (v - v_ref)^2. For a true critic and linear weights E[w | x_sigma] = 0, so that
   the expectation is unchanged; the gradient becomes w (v_ref - u) + alpha (v - v_ref), whose noise does not grow with
   the distance from the reference, and with alpha > 0 every row has a minimum. ADRPO's adaptive weight does the same.
6. With `w2_every` n, the W2 term is measured on every n-th row, n times as heavy: the same expectation for an n-th of
   the reference's forward passes. Its gradient, alpha (v - v_ref), has no noise of u, so that a few rows tell it.
7. With `anchor_decay`, v_ref is a moving average of the policy, updated once per iteration (as in 2404.09656): the
   pull then bounds the policy's speed and not its distance, and the gain does not end where pull and signal balance.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from flowbench.algorithm import Algorithm, AlgorithmConfig, Batch, Loss, Rollout, endpoints, register_algorithm, visited
from flowbench.models.flow import velocity_error
from flowbench.models.policy import Policy
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

    cfg: Config
    ablations: ClassVar = ({"clip": None}, {"warmup": 0}, {"shaping": "none"}, {"alpha": 0.0}, {"critic": "direct"})

    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        self.shape = RewardShaping("none" if self.cfg.critic == "direct" else self.cfg.shaping)
        self.iteration = 0
        self.anchor = "reference" if self.cfg.anchor_decay is None else "average"
        if self.anchor == "average":
            policy.add_view("average")
        if self.cfg.critic != "none":
            from flowbench.toolkit.critic import StateCritic

            torch.manual_seed(0)
            channels, *sides = policy.latent_shape
            self.critic = StateCritic(channels, policy.pooled_width, self.cfg.critic_width, min(sides))

    def needs(self) -> frozenset[str]:
        return self.info.needs if self.cfg.states == "trajectory" else frozenset({"endpoint"})

    def prepare(self, rollout: Rollout) -> Batch:
        """Rows whose `advantage` is the critic's target r_s; the advantage itself depends on the state."""
        self.iteration = rollout.iteration
        shaped = self.shape(rollout)
        if self.cfg.states == "trajectory":
            return visited(rollout, shaped, self.policy.draw_integers(len(rollout.sigmas) - 1, len(rollout)))
        return endpoints(rollout, shaped, copies=self.cfg.states_per_image)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        x, sigma, u = self._state(policy, batch)
        value, critic_loss = self._value(x, sigma, batch)
        metrics: dict[str, torch.Tensor | float] = {}
        if critic_loss is not None:
            from flowbench.toolkit.critic import explained_by_sigma

            metrics = {"critic_loss": critic_loss.mean(), **explained_by_sigma(value, batch.advantage, sigma)}
        if self.iteration < self.cfg.warmup and critic_loss is not None:
            return Loss(None, critic_loss, metrics)
        advantage = batch.advantage - value
        if self.cfg.clip is not None:
            metrics["clipped"] = (advantage.abs() > self.cfg.clip).float().mean()
            advantage = advantage.clamp(-self.cfg.clip, self.cfg.clip)
        w = WEIGHTS[self.cfg.weight](advantage, self.cfg.tau)
        metrics["effective_sample_size"] = w.abs().sum() ** 2 / (len(w) * w.square().sum().clamp_min(1e-12))
        if self.cfg.center:
            w = w - w.mean()
        v = policy.velocity(x, sigma, batch.cond)
        fit = velocity_error(v, u)
        loss = w * fit
        if self.cfg.alpha or self.cfg.control_variate:
            some = torch.arange(0, len(x), self.cfg.w2_every, device=x.device)
            v_ref = policy.velocity(x[some], sigma[some], batch.cond.select(some), weights=self.anchor)
            w2 = velocity_error(v[some], v_ref)
            pull = self.cfg.alpha - w[some] if self.cfg.control_variate else self.cfg.alpha
            loss, metrics["w2"] = loss.index_add(0, some, pull * w2, alpha=len(x) / len(some)), w2.mean()
        return Loss(loss, critic_loss, {**metrics, "fit": fit.mean()})

    def auxiliary_loss(self, policy: Policy, batch: Batch) -> torch.Tensor | None:
        x, sigma, _ = self._state(policy, batch)
        return self._value(x, sigma, batch)[1]

    def after_iteration(self, policy: Policy) -> None:
        if self.cfg.anchor_decay is not None:
            policy.update_view("average", self.cfg.anchor_decay)

    def networks(self) -> dict[str, torch.nn.Module]:
        return {} if self.cfg.critic == "none" else {"critic": self.critic}

    def state_dict(self) -> dict[str, Any]:
        return {"shaping": dict(self.shape.running)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shape.running = dict(state["shaping"])

    def _state(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_sigma, sigma and the target velocity of the straight path that joins x_sigma to its x0."""
        if self.cfg.states == "renoised":
            noisy = policy.renoise(batch.x0, share=batch.group if self.cfg.shared_noise else None)
            return noisy.x, noisy.sigma, noisy.u
        x, sigma = batch.state()
        return x, sigma, (x - batch.x0) / sigma[:, None, None, None]

    def _value(self, x: torch.Tensor, sigma: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.cfg.critic == "none":
            return torch.zeros_like(batch.advantage), None
        value = self.critic(x.detach(), sigma, batch.cond.pooled[batch.cond.index])
        error = torch.nn.functional.mse_loss if self.cfg.critic_loss == "mse" else torch.nn.functional.huber_loss
        return value.detach(), error(value, batch.advantage, reduction="none")
