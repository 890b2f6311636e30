from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowbench.algorithms.ddpo import Ddpo
from flowbench.models.flow import SAMPLERS, Step, flow_sde_step, gaussian_log_prob
from flowbench.models.policy import Policy
from flowbench.rollout import Batch, Conditioning, Rollout
from flowbench.training.state import load_state, save_state

WIDE = {"clip_range": 0.5}


def conditioning(n: int) -> Conditioning:
    return Conditioning({}, torch.zeros(n, dtype=torch.int64))


@pytest.fixture
def rollout(make_policy: Any) -> tuple[Policy, Rollout]:
    """Six images of two prompts by the stochastic sampler, with rewards of no meaning."""
    policy = make_policy(sampler="flow-sde", eta=0.7)
    prompts = ("a red circle",) * 3 + ("two crosses",) * 3
    policy.generator = torch.Generator().manual_seed(0)
    cond = policy.encode(prompts)
    samples = policy.rollout(cond, policy.draw_noise(6), sampler=SAMPLERS["flow-sde"], keep_states=True)
    reward = torch.tensor([0.1, 0.9, 0.3, -2.0, -1.0, 5.0])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    images = torch.zeros(6, 3, 4, 4)
    return policy, Rollout(
        0, prompts, group, cond, samples.sigmas, samples.x0, images, reward, samples.states, samples.log_prob
    )


def test_the_log_prob_of_a_rollout_is_that_of_its_transitions(rollout: tuple[Policy, Rollout]):
    policy, r = rollout
    for k in range(4):
        with torch.no_grad():
            step = policy.transition(r.states[:, k], r.sigmas[k].expand(6), r.sigmas[k + 1].expand(6), r.cond)
        expected = torch.distributions.Normal(step.mean, step.std.expand_as(step.mean)).log_prob(r.states[:, k + 1])
        assert torch.allclose(r.log_prob[:, k], expected.sum((1, 2, 3)), rtol=1e-4)


def test_while_a_prompts_buffer_is_short_its_images_are_compared_with_the_whole_iteration(
    rollout: tuple[Policy, Rollout],
):
    policy, r = rollout
    algorithm = Ddpo(Ddpo.Config(advantage_clip=1.0))
    algorithm.setup(policy)
    batch = algorithm.prepare(r)
    expected = ((r.reward - r.reward.mean()) / r.reward.std(correction=0)).clamp(-1, 1)
    assert len(batch) == 24
    assert torch.allclose(batch.advantage.view(6, 4), expected[:, None].expand(6, 4), atol=1e-5)
    assert batch.advantage.max() == 1.0


def test_once_a_prompts_buffer_is_long_enough_its_images_are_compared_with_it(rollout: tuple[Policy, Rollout]):
    """Worked out by hand: a buffer of 4 holds the last reward of the first iteration and the three of the second."""
    policy, r = rollout
    algorithm = Ddpo(Ddpo.Config(buffer_size=4, min_count=4))
    algorithm.setup(policy)
    algorithm.prepare(r)
    again = replace(r, reward=torch.tensor([0.7, 0.5, 0.5, 5.0, 5.0, 5.0]))
    a = algorithm.prepare(again).advantage.view(6, 4)[:, 0]
    # 0.3, 0.7, 0.5, 0.5: mean 0.5, deviation sqrt(0.02); 5, 5, 5, 5: no deviation at all
    assert a.tolist() == pytest.approx([2**0.5, 0.0, 0.0, 0.0, 0.0, 0.0], abs=1e-4)
    assert algorithm.state_dict()["rewards"]["a red circle"] == pytest.approx([0.3, 0.7, 0.5, 0.5])


def test_its_buffers_are_part_of_the_checkpoint(rollout: tuple[Policy, Rollout], tmp_path: Path):
    policy, r = rollout
    first, second = (Ddpo(Ddpo.Config(min_count=4)) for _ in range(2))
    first.setup(policy)
    second.setup(policy)
    first.prepare(r)
    save_state(tmp_path / "state.safetensors", first.state_dict())
    second.load_state_dict(load_state(tmp_path / "state.safetensors"))
    again = replace(r, reward=torch.tensor([1.0, 0.5, -0.3, 0.2, 2.0, 0.0]))
    assert torch.equal(first.prepare(again).advantage, second.prepare(again).advantage)


def test_its_gradient_at_ratio_one_is_that_of_reinforce(rollout: tuple[Policy, Rollout]):
    policy, r = rollout
    algorithm = Ddpo(Ddpo.Config(**WIDE))
    algorithm.setup(policy)
    batch = algorithm.prepare(r)
    parameters = policy.trainable_parameters()
    ours = torch.autograd.grad(algorithm.loss(policy, batch).policy.mean(), parameters, allow_unused=True)

    taken = batch.transition()
    step = policy.transition(taken.x, taken.sigma, taken.sigma_next, batch.cond)
    log_prob = gaussian_log_prob(taken.x_next, step)
    assert torch.allclose(log_prob, taken.log_prob_old, rtol=1e-4)
    surrogate = -(batch.advantage * log_prob).mean() / r.x0[0].numel()
    theirs = torch.autograd.grad(surrogate, parameters, allow_unused=True)
    flat = [torch.cat([g.flatten() for g in gs if g is not None]) for gs in (ours, theirs)]
    assert flat[1].norm() > 1e-6
    assert (flat[0] - flat[1]).norm() < 1e-3 * flat[1].norm()


class LinearPolicy:
    """One-dimensional flow v = 0.3 x + theta, sampled by Flow-SDE."""

    eta, sampler = 0.7, SAMPLERS["flow-sde"]

    def __init__(self, theta: float) -> None:
        self.theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)

    def transition(self, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, cond: object) -> Step:
        return flow_sde_step(x, 0.3 * x + self.theta, sigma, sigma_next, self.eta)

    def rollout(self, noise: torch.Tensor) -> Rollout:
        """noise (steps + 1, n): the start, and what each step adds."""
        n, sigmas = noise.shape[1], torch.linspace(1, 0, len(noise), dtype=torch.float64)
        states, log_probs = [noise[0].view(n, 1, 1, 1)], []
        with torch.no_grad():
            for (sigma, sigma_next), extra in zip(pairwise(sigmas), noise[1:], strict=True):
                step = self.transition(states[-1], sigma.expand(n), sigma_next.expand(n), None)
                states.append(step.mean + step.std * extra.view(n, 1, 1, 1))
                log_probs.append(gaussian_log_prob(states[-1], step))
        x0 = states[-1]
        reward = -(x0.flatten() - 1.0).square().float()
        group = torch.zeros(n, dtype=torch.int64)
        stacked = torch.stack(states, 1), torch.stack(log_probs, 1)
        return Rollout(0, ("p",) * n, group, conditioning(n), sigmas, x0, x0, reward, *stacked)


def test_its_expected_gradient_is_that_of_the_samplers_expected_reward():
    """Against finite differences of E[r] with common noise; the mean over transitions is undone by the factor 4."""
    generator = torch.Generator().manual_seed(0)
    n, steps, h = 100_000, 4, 1e-2
    noise = torch.randn(steps + 1, n, generator=generator, dtype=torch.float64)
    up, down = (LinearPolicy(0.2 + d).rollout(noise).reward for d in (h, -h))
    exact = ((up - down).double() / (2 * h)).mean().item()

    policy = LinearPolicy(0.2)
    rollout = policy.rollout(noise)
    algorithm = Ddpo(Ddpo.Config(advantage_clip=1e9, buffer_size=n, **WIDE))
    algorithm.setup(policy)
    loss = algorithm.loss(policy, algorithm.prepare(rollout)).policy
    estimate = -steps * torch.autograd.grad(loss.mean(), policy.theta)[0].item() * rollout.reward.std().item()
    assert abs(exact) > 0.3
    assert estimate == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize(
    ("advantage", "rho", "flows"),
    [
        (1.0, 0.7, True),
        (1.0, 0.9, True),
        (1.0, 1.19, True),
        (1.0, 1.21, False),
        (1.0, 3.0, False),
        (-1.0, 0.5, False),
        (-1.0, 0.79, False),
        (-1.0, 0.81, True),
        (-1.0, 1.1, True),
        (-1.0, 1.5, True),
        (0.0, 1.0, False),
    ],
)
def test_clipping_stops_the_gradient_exactly_where_the_formula_says(advantage: float, rho: float, flows: bool):
    """max(-A rho, -A clip(rho, 0.8, 1.2)) is flat for A > 0 above 1.2 and for A < 0 below 0.8."""
    mean = torch.zeros(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    x_next = torch.full((1, 1, 2, 2), 0.3, dtype=torch.float64)
    std = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    new = torch.distributions.Normal(mean, 1.0).log_prob(x_next).sum().detach()
    old = new - 4 * torch.log(torch.tensor(rho, dtype=torch.float64))  # the ratio's log is a mean over 4 dimensions
    policy: Any = SimpleNamespace(transition=lambda *_: Step(mean, std), sampler=SAMPLERS["flow-sde"])
    row = torch.zeros(1, dtype=torch.float64)
    a = torch.tensor([advantage], dtype=torch.float64)
    batch = Batch(("p",), conditioning(1), x_next, a, x_next, x_next, row, row, old.view(1))
    loss = Ddpo(Ddpo.Config(clip_range=0.2)).loss(policy, batch)
    bounded = min(max(rho, 0.8), 1.2)
    assert loss.policy.item() == pytest.approx(max(-advantage * rho, -advantage * bounded))
    assert float(loss.metrics["clipped"]) == float(not 0.8 <= rho <= 1.2)
    (gradient,) = torch.autograd.grad(loss.policy.sum(), mean)
    # d rho / d mean = rho (x' - mean) / (4 std^2)
    expected = -advantage * rho * 0.3 / 4 if flows else 0.0
    assert gradient.flatten().tolist() == pytest.approx([expected] * 4)


def test_a_share_of_the_steps_keeps_different_steps_of_every_image(rollout: tuple[Policy, Rollout]):
    policy, r = rollout
    algorithm = Ddpo(Ddpo.Config(steps_per_image=2))
    algorithm.setup(policy)
    batch = algorithm.prepare(r)
    assert len(batch) == 12
    sigma = batch.transition().sigma.view(6, 2)
    assert (sigma[:, 0] != sigma[:, 1]).all()
    assert batch.prompts == tuple(p for p in r.prompts for _ in range(2))
