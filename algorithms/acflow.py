"""AC-Flow: an actor-critic for flow matching (arXiv:2510.18072).

    r_s  = shape(r)
    V    = V_phi(x_sigma, sigma, c)                          regressed on r_s
    A    = clip(r_s - V, -c, c)
    w    = weight(A)
    loss = w mean_d (v - u)^2 + alpha mean_d (v - v_ref)^2   after the critic's warm-up

What the paper is known to say (its abstract and summaries; no code, no formula and no number is public):
- A light critic V_phi(x_t, t, c) of MLP layers, layer norms and convolutions regresses the shaped terminal reward.
- The advantage is reward minus value, clipped. The critic warms up before it acts.
- Reward weighting is generalised to intermediate values; ORW-CFM-W2 (2502.06061) is the case without any.
- Wasserstein-2 regularisation as there: a pull to the fixed reference.

What flowbench had to choose; every default is its own, measured on mini-sd3 alone:
1. How rewards are shaped, the bound of the advantage, the weighting and its tau, the critic's size, every number.
2. States are re-noised samples by default, so that V* = E[r_s | x_sigma]; "trajectory" takes the sampler's own states.
3. The critic sees a summary of the text: the pooled embedding, or the mean of the tokens where a model has none.

What flowbench added; the page's literal configuration has none of it:
4. Weights may be centred over the batch (`center`). Positive weights whose mean is not zero also distil the model on
   its own discretised samples; at small budgets that drift is stronger than the signal.
5. The images of a prompt are re-noised with the same noise and sigma, unless `training.shared_noise` says otherwise.
   Their centred advantages sum to about zero, so that what the noise alone adds to the gradient cancels, and the
   expectation is unchanged. Whether that helps is open: for nft, signal to noise was the same with and without.
6. `control_variate` subtracts w mean_d (v - v_ref)^2. For a true critic and linear weights E[w | x_sigma] = 0, so that
   the expectation is unchanged; the gradient becomes w (v_ref - u) + alpha (v - v_ref), whose noise does not grow with
   the distance from the reference, and with alpha > 0 every row has a minimum. ADRPO's adaptive weight does the same.
7. With `w2_every` n, the W2 term is measured on every n-th row, n times as heavy: the same expectation for an n-th of
   the reference's forward passes. Its gradient, alpha (v - v_ref), has no noise of u, so that a few rows tell it. Which
   rows they are is decided in `prepare`, over the whole iteration.
8. On Stable Diffusion 3 v_ref is a moving average of the policy (`training.anchor_decay`, as in
   2404.09656): the pull then bounds the policy's speed and not its distance, and the gain does not end where pull and
   signal balance.
9. The critics "sees" and "preview" look at the one-step estimate x0_hat (flowbench.toolkit.seeing).
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
from flowbench.toolkit.critic import errors_within_prompts, explained_by_sigma, sight
from flowbench.toolkit.defaults import HAND_SEARCH, OWN_NETWORKS, with_common
from flowbench.toolkit.matching import state_of
from flowbench.toolkit.seeing import CriticKind, PreviewCritic, make_critic
from flowbench.toolkit.shaping import WEIGHTS, Kind, RewardShaping, Weighting, clipped, effective_sample_size


@register_algorithm("acflow", paper="arXiv:2510.18072", needs={"endpoint", "states"}, family="forward-process")
class AcFlow(Algorithm["AcFlow.Config"]):
    """Actor-critic flow matching: a critic of intermediate states turns rewards into clipped, generalized weights."""

    class Config(AlgorithmConfig):
        added_later: ClassVar = frozenset({"log_preview", "w2_every"})

        shaping: Kind = Field("standardize", description="how rewards become r_s; see flowbench.toolkit.shaping")
        critic: CriticKind = Field(
            "shaped", description="a network on r_s or raw r, none (V = 0), one that sees x0_hat, or r(x0_hat) itself"
        )
        critic_loss: Literal["mse", "huber"] = Field("mse", description="error of the critic")
        critic_width: int = Field(64, ge=8, description="channels of the critic")
        states: Literal["renoised", "trajectory"] = Field("renoised", description="noised x0, or the sampler's states")
        states_per_image: int = Field(1, ge=1, description="noisy states per image and pass, for re-noised states")
        clip: float | None = Field(2.0, gt=0, description="bound on |A|; null is none")
        warmup: int = Field(5, ge=0, description="iterations in which only the critic learns")
        weight: Weighting = Field("linear", description="the generalized weighting of the advantage")
        tau: float = Field(1.0, gt=0, description="temperature of the weighting")
        center: bool = Field(True, description="subtract the batch mean of the weights")
        alpha: float = Field(1.0, ge=0, description="Wasserstein-2 regularisation")
        w2_every: int = Field(1, ge=1, description="measure the W2 term on every n-th row")
        control_variate: bool = Field(False, description="subtract w mean_d (v - v_ref)^2 from the loss")
        log_preview: bool = Field(False, description="log what r(x0_hat) explains; a reward call and pass per row")

        def least_group(self) -> int:
            return 2 if RewardShaping(self.shaping).centers else 1

        def warmup_iterations(self) -> int:
            return 0 if self.critic == "none" else self.warmup

    cfg: Config
    metrics: ClassVar = {
        "critic_loss": "error of V against its target",
        "explained_variance": "share of the target's variance that V explains, from this sigma on",
        "clipped": "share of advantages at the bound",
        "effective_sample_size": "(sum |w|)^2 / (n sum w^2), before centring",
    }
    defaults: ClassVar = {
        "mini-sd3": with_common(
            "mini-sd3",
            "forward-process",
            {**OWN_NETWORKS, "learning_rate": 3e-4, "ema": 0.97},
            log=HAND_SEARCH,
            takes=("states_per_image",),
        ),
        # Not measured there; the page has the reasons at length.
        "sd3.5-medium": Defaults(
            {
                "guidance_scale": 1.0,  # images of the policy whose velocity is regressed: docs/guidance.md
                "prompts_per_iteration": 48,  # as the codes of Flow-GRPO and NFT
                "images_per_prompt": 8,  # their 24 leave nine iterations of 9,600 images; 8 leave 25
                "minibatch": 768,  # two optimizer steps per iteration, as Flow-GRPO's code
                "sigma_distribution": "sampler",  # the levels that sampling visits, as NFT's code
                "learning_rate": 3e-4,  # of LoRA in the codes of Flow-GRPO, NFT and AWM
                "ema": 0.987,  # Flow-GRPO's code: 0.9 every 8 optimizer steps
                "auxiliary_steps": 4,  # each draws the noise of a minibatch anew, 200 MB on the host
                "anchor_decay": 0.95,  # with alpha 2 no run-away in 240 iterations of mini-sd3, five of five seeds
            },
            {
                "shaping": "normalize",  # fewer rows without a minimum than with "standardize"
                "critic": "shaped",  # the paper's, and the one that costs no pass of the transformer
                "warmup": 2,  # of 25 iterations of 9,600 images: 3,072 states, 16 steps of the critic
                "states_per_image": 4,  # twice the gradient's signal to noise of 1; NFT's code has 9, AWM's 6
                "alpha": 2.0,
                "w2_every": 4,  # each image once among its four states: a quarter of the reference's passes
            },
        ),
    }
    search_space: ClassVar = {
        **COMMON_SEARCH_SPACE,
        "algorithm.critic": Choice(("shaped", "direct", "none", "sees", "preview")),  # all that there are
        "algorithm.alpha": LogUniform(0.1, 10.0),  # 1: ORW-CFM-W2's code, same term; the paper's is not public
    }
    ablations: ClassVar = (
        {"clip": None},
        {"warmup": 0},
        {"shaping": "none"},
        {"alpha": 0.0},
        {"critic": "direct"},
        {"critic": "none"},
        {"critic": "sees"},
        {"critic": "preview"},
        {"center": False},
        {"training.shared_noise": False},
        {"w2_every": 4},
        {"training.anchor_decay": 0.95},
        {"control_variate": True},
    )

    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        self.shape = RewardShaping("none" if self.cfg.critic == "direct" else self.cfg.shaping)
        self.warming_up = False
        self.critics = {"value": make_critic(self.cfg.critic, policy, self.cfg.critic_width, self.shape.centers)}
        if self.cfg.log_preview:
            self.critics["preview"] = PreviewCritic()

    def needs(self) -> frozenset[str]:
        return self.info.needs if self.cfg.states == "trajectory" else frozenset({"endpoint"})

    def draws(self) -> Draws:
        fresh = self.cfg.states == "renoised"
        return Draws(noises=int(fresh), sigma=fresh, shared=True)

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
        rows = sight(batch)
        values = {name: critic.measure(policy, rows, self.score) for name, critic in self.critics.items()}
        return {"target": rows.target, "sigma": rows.sigma, "group": rows.group, **values}

    def compare(self, scalars: Mapping[str, torch.Tensor]) -> Compared:
        """Each row's value V and weight w."""
        target, sigma, group = scalars["target"], scalars["sigma"], scalars["group"]
        values = {name: critic.judge(scalars[name], sigma, group) for name, critic in self.critics.items()}
        value, metrics = values["value"], errors_within_prompts(values, target, sigma, group)
        if self.cfg.critic != "none":
            metrics |= explained_by_sigma(value, target, sigma)
        if self.warming_up:
            return Compared({"value": value}, metrics)
        advantage, clipping = clipped(target - value, self.cfg.clip)
        w = WEIGHTS[self.cfg.weight](advantage, self.cfg.tau)
        metrics |= {**clipping, "effective_sample_size": effective_sample_size(w)}
        return Compared({"value": value, "weight": w - w.mean() if self.cfg.center else w}, metrics)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        state = state_of(batch)
        critic_loss = self.auxiliary_loss(policy, batch)
        metrics = {} if critic_loss is None else {"critic_loss": critic_loss}
        if self.warming_up:
            return Loss(None, critic_loss, metrics)
        w, anchored = batch.scalars["weight"], batch.scalars["anchored"]
        v = policy.velocity(state.x, state.sigma, batch.cond)
        fit = velocity_error(v, state.u)
        loss, metrics["fit"] = w * fit, fit
        some = anchored.nonzero()[:, 0]
        if (self.cfg.alpha or self.cfg.control_variate) and len(some):
            v_ref = policy.velocity(state.x[some], state.sigma[some], batch.cond.select(some), weights="reference")
            w2 = velocity_error(v[some], v_ref)
            pull = self.cfg.alpha - w[some] if self.cfg.control_variate else self.cfg.alpha
            loss, metrics["w2"] = loss.index_add(0, some, anchored[some] * (pull * w2)), w2
        return Loss(loss, critic_loss, metrics)

    def auxiliary_loss(self, policy: Policy, batch: Batch) -> torch.Tensor | None:
        if self.cfg.critic == "none":
            return None
        value = self.critics["value"].trained(policy, sight(batch), batch.scalars.get("value"))
        error = torch.nn.functional.mse_loss if self.cfg.critic_loss == "mse" else torch.nn.functional.huber_loss
        return error(value, batch.advantage, reduction="none")

    def after_iteration(self, policy: Policy) -> None:
        for critic in self.critics.values():
            critic.learn(policy.processes)

    def networks(self) -> dict[str, torch.nn.Module]:
        network = self.critics["value"].network
        return {} if network is None else {"critic": network}

    def state_dict(self) -> dict[str, Any]:
        critics = {name: critic.state_dict() for name, critic in self.critics.items()}
        return {"shaping": dict(self.shape.running), "critics": critics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shape.running = dict(state["shaping"])
        for name, critic in self.critics.items():
            critic.load_state_dict(state["critics"][name])
