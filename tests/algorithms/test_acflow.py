from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import minibatch_loss as loss_of

from flowbench.algorithms.acflow import AcFlow
from flowbench.config import RunConfig
from flowbench.models.flow import interpolate
from flowbench.models.policy import Policy
from flowbench.rollout import Conditioning, Rollout
from flowbench.toolkit.critic import StateCritic, explained_variance
from flowbench.toolkit.matching import renoised
from flowbench.toolkit.shaping import WEIGHTS
from flowbench.training.rows import drawn
from flowbench.training.trainer import Trainer

minibatch_loss = functools.partial(loss_of, shared_noise=False)  # also where images are of one prompt
PLAIN = {
    "algorithm.critic": "none",
    "algorithm.shaping": "none",
    "algorithm.clip": None,
    "algorithm.weight": "exp",
    "algorithm.center": False,
    "training.shared_noise": False,
    "algorithm.warmup": 0,
    "algorithm.states": "renoised",
    "algorithm.states_per_image": 1,
}
LINEAR: dict[str, Any] = {
    "critic": "none",
    "shaping": "none",
    "clip": None,
    "weight": "linear",
    "center": True,
}


@pytest.fixture
def rollout(shared_policy: Policy) -> Rollout:
    """Twelve images of three prompts, with random rewards; nothing of it is drawn by a model."""
    generator = torch.Generator().manual_seed(0)
    prompts = tuple(p for p in ("a red circle", "two crosses", "a small square") for _ in range(4))
    x0 = torch.randn(12, *shared_policy.latent_shape, generator=generator)
    states = torch.randn(12, 5, *shared_policy.latent_shape, generator=generator)
    states[:, -1] = x0
    return Rollout(
        iteration=10,
        prompts=prompts,
        group=torch.arange(3).repeat_interleave(4),
        cond=shared_policy.encode(prompts),
        sigmas=torch.linspace(1, 0, 5),
        x0=x0,
        images=torch.zeros(12, 3, 4, 4),
        reward=torch.randn(12, generator=generator) + torch.tensor([0.0, 5.0, -5.0]).repeat_interleave(4),
        states=states,
    )


def build(policy: Policy, **settings: Any) -> AcFlow:
    settings = {"warmup": 0, **settings}
    algorithm = AcFlow(AcFlow.Config(**settings))
    algorithm.setup(policy)
    policy.generator = torch.Generator().manual_seed(1)
    return algorithm


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_without_a_critic_it_equals_orw_cfm_w2_bit_for_bit(
    tmp_path: Path, tiny_config: Callable[..., RunConfig], make_trainer: Callable[..., Trainer], alpha: float
):
    shared = {"algorithm.tau": 0.8, "algorithm.alpha": alpha, "training.epochs": 2, "training.microbatch": 3}
    shared |= {"training.prompts_per_iteration": 2, "training.images": 16, "training.minibatch": 4}
    ours = make_trainer(tiny_config("acflow", overrides={**shared, **PLAIN}), tmp_path / "acflow")
    theirs = make_trainer(
        tiny_config("orw-cfm-w2", overrides={**shared, "algorithm.normalize": "none"}), tmp_path / "orw"
    )
    start = copy.deepcopy(ours.updater.parameters)
    logs: dict[str, list] = {"ours": [], "theirs": []}
    ours.on_iteration, theirs.on_iteration = logs["ours"].append, logs["theirs"].append
    ours.run()
    theirs.run()
    for a, b in zip(ours.updater.parameters, theirs.updater.parameters, strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(ours.updater.parameters, start, strict=True))
    for a, b in zip(logs["ours"], logs["theirs"], strict=True):
        assert a.reward == b.reward
        assert a.metrics["fit"] == b.metrics["fit"]
        assert a.metrics["grad_norm"] == b.metrics["grad_norm"]


def test_without_a_critic_its_loss_equals_that_of_orw_cfm_w2_bit_for_bit(shared_policy: Policy, rollout: Rollout):
    from flowbench.algorithms.orw_cfm_w2 import OrwCfmW2

    own = {key.removeprefix("algorithm."): value for key, value in PLAIN.items() if key.startswith("algorithm.")}
    settings = {**own, "tau": 0.8, "alpha": 0.7}
    ours, theirs = build(shared_policy, **settings), OrwCfmW2(OrwCfmW2.Config(tau=0.8, alpha=0.7, normalize="none"))
    theirs.setup(shared_policy)
    losses = []
    for algorithm in (ours, theirs):
        shared_policy.generator = torch.Generator().manual_seed(4)
        losses.append(minibatch_loss(algorithm, shared_policy, algorithm.prepare(rollout)).policy)
    assert torch.equal(*losses)


def test_warm_up_trains_the_critic_and_leaves_the_policy_alone(
    tmp_path: Path, tiny_config: Callable[..., RunConfig], make_trainer: Callable[..., Trainer]
):
    warmup = {"algorithm.critic": "shaped", "algorithm.warmup": 2, "training.images": 48}
    trainer = make_trainer(tiny_config("acflow", overrides=warmup), tmp_path)
    policy_before = copy.deepcopy(trainer.updater.parameters)
    critic = trainer.updater.auxiliary_parameters
    critic_before = copy.deepcopy(critic)
    changed = []

    def compare(log: object) -> None:
        changed.append(
            any(not torch.equal(a, b) for a, b in zip(trainer.updater.parameters, policy_before, strict=True))
        )

    trainer.on_iteration = compare
    trainer.run()
    assert changed == [False, False, True]
    assert any(not torch.equal(a, b) for a, b in zip(critic, critic_before, strict=True))


def test_an_untrained_critic_predicts_zero(shared_policy: Policy, rollout: Rollout):
    critic = build(shared_policy, critic="shaped").networks()["critic"]
    summary = shared_policy.text_summary(rollout.cond)
    assert torch.equal(critic(rollout.x0, torch.rand(12), summary), torch.zeros(12))


def test_the_critics_gradient_stays_out_of_the_policy_and_the_other_way_round(make_policy: Callable, rollout: Rollout):
    policy = make_policy()
    algorithm = build(policy, critic="shaped", shaping="center")
    torch.nn.init.normal_(algorithm.networks()["critic"].head[-1].weight)
    loss = minibatch_loss(algorithm, policy, algorithm.prepare(rollout))
    loss.auxiliary.mean().backward(retain_graph=True)
    assert all(p.grad is None for p in policy.trainable_parameters())
    critic_gradient = [p.grad.clone() for p in algorithm.networks()["critic"].parameters()]
    loss.policy.mean().backward()
    for p, before in zip(algorithm.networks()["critic"].parameters(), critic_gradient, strict=True):
        assert torch.equal(p.grad, before)


def test_shaping_centres_each_prompt_and_scales_by_the_running_deviation(shared_policy: Policy, rollout: Rollout):
    def shaped(kind: str, r: Rollout = rollout) -> torch.Tensor:
        return build(shared_policy, shaping=kind).prepare(r).advantage

    centered = rollout.reward - rollout.reward.view(3, 4).mean(1).repeat_interleave(4)
    assert torch.equal(shaped("none"), rollout.reward)
    assert torch.allclose(shaped("center"), centered, atol=1e-6)
    normalized = centered / centered.std()
    assert torch.allclose(shaped("normalize"), normalized, atol=1e-4)
    assert torch.allclose(shaped("squash"), torch.tanh(normalized), atol=1e-4)

    algorithm = build(shared_policy, shaping="normalize")
    algorithm.prepare(rollout)
    second = algorithm.prepare(replace(rollout, reward=3 * rollout.reward)).advantage
    scale = (0.9 + 0.1 * 3) * centered.std()
    assert torch.allclose(second, 3 * centered / scale, atol=1e-4)


def test_the_direct_critic_regresses_the_raw_return(shared_policy: Policy, rollout: Rollout):
    batch = build(shared_policy, critic="direct", shaping="squash").prepare(rollout)
    assert torch.equal(batch.advantage, rollout.reward)


def test_the_running_deviation_survives_a_checkpoint(shared_policy: Policy, rollout: Rollout):
    algorithm = build(shared_policy, shaping="normalize")
    algorithm.prepare(rollout)
    other = build(shared_policy, shaping="normalize")
    other.load_state_dict(algorithm.state_dict())
    scaled = replace(rollout, reward=2 * rollout.reward)
    assert torch.equal(other.prepare(scaled).advantage, algorithm.prepare(scaled).advantage)


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_weights_never_fall_with_the_advantage(name: str):
    a = torch.linspace(-3, 3, 101)
    w = WEIGHTS[name](a, 1.3)
    assert (w.diff() >= 0).all()
    assert w[-1] > w[0]


def test_weights_have_their_closed_forms():
    a = torch.tensor([-1.0, 0.0, 2.0])
    assert WEIGHTS["exp"](a, 0.5).tolist() == pytest.approx([math.exp(-0.5), 1, math.exp(1)])
    assert WEIGHTS["softplus"](a, 0.5).tolist() == pytest.approx([math.log1p(math.exp(0.5 * v)) for v in (-1, 0, 2)])
    assert WEIGHTS["sigmoid"](a, 0.5).tolist() == pytest.approx([1 / (1 + math.exp(-0.5 * v)) for v in (-1, 0, 2)])
    assert WEIGHTS["linear"](a, 0.5).tolist() == [-0.5, 0, 1]
    assert WEIGHTS["topk"](a, 0.5).tolist() == [0, 1, 1]


class ConstantVelocity:
    """A policy whose velocity is one parameter for every state, beside a reference of zero."""

    latent_shape, text_width = (1, 1, 1), 4

    def __init__(self) -> None:
        self.v = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
        self.u = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64).view(4, 1, 1, 1)

    def text_summary(self, cond: Conditioning) -> torch.Tensor:
        return torch.zeros(len(cond), 4)

    def draw_noise(self, n: int, device: torch.device | None = None) -> torch.Tensor:
        return self.u  # of images that are 0

    def draw_sigmas(self, n: int) -> torch.Tensor:
        return torch.full((n,), 0.5, dtype=torch.float64)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, cond: object, weights: str = "current") -> torch.Tensor:
        return self.v.expand_as(x) if weights == "current" else torch.full_like(x, 0.25)


def constant_rollout(reward: torch.Tensor) -> Rollout:
    n = len(reward)
    return Rollout(
        iteration=0,
        prompts=("p",) * n,
        group=torch.zeros(n, dtype=torch.int64),
        cond=Conditioning({}, torch.zeros(n, dtype=torch.int64)),
        sigmas=torch.linspace(1, 0, 3),
        x0=torch.zeros(n, 1, 1, 1, dtype=torch.float64),
        images=torch.zeros(n, 3, 1, 1),
        reward=reward,
    )


def test_its_minimiser_is_the_weighted_mean_of_target_and_reference_velocities():
    """v* = (E[w u] + alpha v_ref) / (E[w] + alpha), where the gradient vanishes."""
    policy, alpha, tau = ConstantVelocity(), 0.6, 0.9
    reward = torch.tensor([0.1, 1.0, -0.4, 0.7], dtype=torch.float64)
    w = torch.exp(tau * reward).view(4, 1, 1, 1)
    best = ((w * policy.u).mean() + alpha * 0.25) / (w.mean() + alpha)
    algorithm = AcFlow(
        AcFlow.Config(
            critic="none",
            shaping="none",
            clip=None,
            weight="exp",
            center=False,
            tau=tau,
            alpha=alpha,
        )
    )
    algorithm.setup(policy)
    batch = algorithm.prepare(constant_rollout(reward))
    for offset, sign in ((0.0, 0), (0.1, 1), (-0.1, -1)):
        policy.v = (best + offset).detach().view(1, 1, 1, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(minibatch_loss(algorithm, policy, batch).policy.mean(), policy.v)
        assert round(gradient.item(), 9) == 0 if sign == 0 else gradient.item() * sign > 0.01


def gradients(policy: ConstantVelocity, reward: torch.Tensor, v: float, **settings: Any) -> torch.Tensor:
    """Of each row's loss with respect to the velocity, (R,), for linear weights without a critic."""
    algorithm = AcFlow(AcFlow.Config(**LINEAR, **settings))
    algorithm.setup(policy)
    policy.v = torch.full((1, 1, 1, 1), v, dtype=torch.float64, requires_grad=True)
    rows = minibatch_loss(algorithm, policy, algorithm.prepare(constant_rollout(reward))).policy
    return torch.stack([torch.autograd.grad(row, policy.v, retain_graph=True)[0].squeeze() for row in rows])


def test_the_control_variate_leaves_the_gradient_of_centred_weights_as_it_is():
    reward = torch.tensor([0.1, 1.0, -0.4, 0.7], dtype=torch.float64)
    for v in (-2.0, 0.25, 3.0):
        plain, controlled = (
            gradients(ConstantVelocity(), reward, v, alpha=0.6, control_variate=on) for on in (False, True)
        )
        assert controlled.mean().item() == pytest.approx(plain.mean().item())


def test_with_the_control_variate_each_row_has_its_minimum_at_a_tilted_reference():
    """v* = v_ref + w (u - v_ref) / alpha, also for a weight below -alpha, where the plain loss has none."""
    policy, alpha = ConstantVelocity(), 0.5
    reward = torch.tensor([-3.0, -1.0, 1.5, 2.5], dtype=torch.float64)  # of mean 0
    u = policy.u.flatten()
    for row, best in enumerate(0.25 + reward * (u - 0.25) / alpha):
        slope = [
            gradients(policy, reward, best.item() + offset, alpha=alpha, control_variate=True)[row].item()
            for offset in (-0.1, 0.0, 0.1)
        ]
        assert slope == pytest.approx([-0.1 * 2 * alpha, 0.0, 0.1 * 2 * alpha], abs=1e-9)
    far = [gradients(policy, reward, v, alpha=alpha, control_variate=False)[0].item() for v in (-50.0, 50.0)]
    assert far[0] > 0 > far[1]  # the plain loss of the first row falls without bound on both sides


def test_the_noise_of_the_gradient_does_not_grow_with_the_distance_from_the_reference_under_the_control_variate():
    reward = torch.tensor([0.1, 1.0, -0.4, 0.7], dtype=torch.float64)

    def noise(v: float, on: bool) -> float:
        return gradients(ConstantVelocity(), reward, v, alpha=0.6, control_variate=on).std().item()

    assert noise(3.0, True) == pytest.approx(noise(0.25, True))
    assert noise(3.0, False) > 2 * noise(0.25, False)


def test_measured_on_every_kth_row_the_w2_term_has_the_same_gradient_in_the_mean_over_row_orders():
    """The control variate makes the term's weight differ between rows, so that a single order is off."""
    reward = torch.tensor([0.1, 1.0, -0.4, 0.7], dtype=torch.float64)
    every_row = gradients(ConstantVelocity(), reward, 3.0, alpha=0.6, control_variate=True).mean().item()
    for k in (2, 3, 4):
        some = []
        for order in itertools.permutations(range(4)):
            policy = ConstantVelocity()
            policy.u = policy.u[list(order)]
            rows = gradients(policy, reward[list(order)], 3.0, alpha=0.6, control_variate=True, w2_every=k)
            some.append(rows.mean().item())
        assert max(some) - min(some) > 0.1
        assert sum(some) / len(some) == pytest.approx(every_row)


def test_measured_on_every_kth_row_the_w2_term_asks_the_reference_for_those_rows_alone(
    shared_policy: Policy, rollout: Rollout
):
    algorithm = build(shared_policy, states_per_image=3, w2_every=4)
    before = shared_policy.function_evaluations
    minibatch_loss(algorithm, shared_policy, algorithm.prepare(rollout))
    assert shared_policy.function_evaluations - before == 36 + 9


class TrailedVelocity(ConstantVelocity):
    """The same, pulled to an anchor that is moved as `training.anchor_decay` moves it."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = self.v.detach().clone()

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, cond: object, weights: str = "current") -> torch.Tensor:
        return {"current": self.v, "reference": self.anchor}[weights].expand_as(x)


def test_an_anchor_that_trails_the_policy_bounds_its_speed_and_not_its_distance():
    """Minimised n times, v_n = s / alpha (1 + (n - 1) (1 - decay)) with s = E[w u]; with a fixed anchor, s / alpha."""
    reward = torch.tensor([0.1, 1.0, -0.4, 0.7], dtype=torch.float64)
    policy, alpha, decay = TrailedVelocity(), 0.6, 0.9
    step = ((reward - reward.mean()) * policy.u.flatten()).mean().item() / alpha
    algorithm = AcFlow(AcFlow.Config(alpha=alpha, **LINEAR))
    algorithm.setup(policy)
    for n in range(1, 6):
        loss = minibatch_loss(algorithm, policy, algorithm.prepare(constant_rollout(reward))).policy.mean()
        (gradient,) = torch.autograd.grad(loss, policy.v)
        policy.v = (policy.v - gradient / (2 * alpha)).detach().requires_grad_()  # the minimum: curvature is 2 alpha
        policy.anchor = decay * policy.anchor + (1 - decay) * policy.v.detach()
        assert policy.v.item() == pytest.approx(step * (1 + (n - 1) * (1 - decay)))


def test_centred_weights_average_to_zero_and_clipped_advantages_stay_in_bounds():
    """With alpha 0 the policy loss is w * fit, so that dividing by fit gives the weights back."""
    policy = ConstantVelocity()
    policy.v = torch.full((1, 1, 1, 1), 5.0, dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([-9.0, 0.5, 0.25, 9.0], dtype=torch.float64)
    fit = (5.0 - policy.u).square().flatten()

    def weights(**settings: Any) -> torch.Tensor:
        settings = {**LINEAR, "alpha": 0.0, "tau": 1.0, **settings}
        algorithm = AcFlow(AcFlow.Config(**settings))
        algorithm.setup(policy)
        return (minibatch_loss(algorithm, policy, algorithm.prepare(constant_rollout(reward))).policy / fit).detach()

    assert weights(clip=2.0, center=False).tolist() == pytest.approx([-2.0, 0.5, 0.25, 2.0])
    assert weights(clip=None, center=False).tolist() == pytest.approx(reward.tolist())
    centred = weights(clip=None, center=True, weight="exp", tau=0.1)
    assert centred.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert (centred - (torch.exp(0.1 * reward) - torch.exp(0.1 * reward).mean())).abs().max() < 1e-12


def test_trajectory_states_are_those_that_the_sampler_visited(shared_policy: Policy, rollout: Rollout):
    algorithm = build(shared_policy, states="trajectory")
    batch = algorithm.prepare(rollout)
    x, sigma = batch.state()
    for i in range(len(rollout)):
        step = int((rollout.sigmas == sigma[i]).nonzero())
        assert step < 4
        assert torch.equal(x[i], rollout.states[i, step])


def test_the_target_velocity_of_a_visited_state_leads_straight_to_its_endpoint(shared_policy: Policy, rollout: Rollout):
    seen = {}

    class Spy(Policy):
        def velocity(self, x: torch.Tensor, sigma: torch.Tensor, cond: Any, weights: str = "current") -> torch.Tensor:
            seen["x"], seen["sigma"] = x, sigma
            return torch.zeros_like(x)

    spy = copy.copy(shared_policy)
    spy.__class__ = Spy
    settings = {"critic": "none", "shaping": "none", "alpha": 0.0, "clip": None, "center": False, "weight": "exp"}
    algorithm = build(spy, states="trajectory", tau=1e-9, **settings)  # all weights are 1
    loss = minibatch_loss(algorithm, spy, algorithm.prepare(rollout)).policy
    u = (seen["x"] - rollout.x0) / seen["sigma"].view(-1, 1, 1, 1)
    assert torch.allclose(loss, u.square().flatten(1).mean(1), rtol=1e-5)
    assert torch.allclose(seen["x"] - seen["sigma"].view(-1, 1, 1, 1) * u, rollout.x0, atol=1e-5)


def test_several_states_per_image_are_rows_of_their_own(shared_policy: Policy, rollout: Rollout):
    batch = build(shared_policy, states_per_image=3).prepare(rollout)
    assert len(batch) == 36
    assert torch.equal(batch.x0, rollout.x0.repeat(3, 1, 1, 1))
    assert batch.prompts == rollout.prompts * 3


def test_the_images_of_a_prompt_share_noise_and_other_rows_do_not(shared_policy: Policy, rollout: Rollout):
    batch = build(shared_policy, states_per_image=2).prepare(rollout)
    noisy = renoised(drawn(build(shared_policy, states_per_image=2), shared_policy, batch))
    eps = (noisy.u + batch.x0).round(decimals=4)
    rows = {tuple(e.flatten().tolist()[:8]) for e in eps}
    assert len(rows) == 2 * len(set(rollout.prompts))
    for group in batch.group.unique():
        same = batch.group == group
        assert len({batch.prompts[i] for i in same.nonzero()[:, 0].tolist()}) == 1
        assert len(noisy.sigma[same].unique()) == 1


def test_sampler_states_are_kept_only_for_trajectory_states(shared_policy: Policy):
    assert "states" in build(shared_policy, states="trajectory").needs()
    assert "states" not in build(shared_policy, states="renoised").needs()


def test_explained_variance_is_one_for_the_truth_and_zero_for_the_mean():
    target = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert explained_variance(target, target).item() == 1
    assert explained_variance(torch.zeros(100), target).item() == pytest.approx(0, abs=1e-6)
    assert explained_variance(-target, target).item() == pytest.approx(-3, abs=1e-5)


def test_the_critic_learns_the_expected_reward_of_a_gaussian():
    """Data N(0, S), r = c . x0: V*(x, sigma) = E[r | x_sigma] = (1 - sigma) S c . x / S_sigma in closed form."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    variance, width = 0.5, 2
    c = torch.randn(width, 4, 4, generator=generator) / (width * 16 * variance) ** 0.5  # r has variance about 1

    def draw(n: int) -> tuple[torch.Tensor, ...]:
        x0, eps = torch.randn(2, n, width, 4, 4, generator=generator)
        x0 *= variance**0.5
        sigma = torch.rand(n, generator=generator) * 0.8 + 0.1
        x = interpolate(x0, eps, sigma)
        s = sigma.view(-1, 1, 1, 1)
        best = ((1 - s) * variance / ((1 - s) ** 2 * variance + s**2) * c * x).sum((1, 2, 3))
        return x, sigma, (c * x0).sum((1, 2, 3)), best

    critic, text = StateCritic(width, 4, width=32), torch.zeros(1, 4)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=3e-3)
    for _ in range(300):
        x, sigma, r, _ = draw(128)
        optimizer.zero_grad()
        (critic(x, sigma, text.expand(128, 4)) - r).square().mean().backward()
        optimizer.step()
    x, sigma, r, best = draw(4000)
    with torch.no_grad():
        value = critic(x, sigma, text.expand(4000, 4))
    assert explained_variance(best, r).item() < 0.9  # the noise hides part of r from any critic
    assert explained_variance(value, best).item() > 0.85
    assert (value - r).square().mean() < 1.2 * (best - r).square().mean()


def test_more_auxiliary_steps_train_the_critic_further_and_leave_the_first_policy_step_alone(
    tmp_path: Path, tiny_config: Callable[..., RunConfig], make_trainer: Callable[..., Trainer]
):
    shared = {"training.images": 16, "algorithm.warmup": 0, "training.minibatch": 16}
    trainers = []
    for steps in (1, 5):
        config = tiny_config("acflow", overrides={**shared, "training.auxiliary_steps": steps})
        trainers.append(make_trainer(config, tmp_path / str(steps)))
        start = copy.deepcopy(trainers[-1].updater.auxiliary_parameters)
        trainers[-1].run()
    one, five = trainers
    moved = [
        sum((p - q).square().sum().item() for p, q in zip(t.updater.auxiliary_parameters, start, strict=True))
        for t in trainers
    ]
    assert moved[1] > moved[0] > 0
    for a, b in zip(one.updater.parameters, five.updater.parameters, strict=True):
        assert torch.equal(a, b)
