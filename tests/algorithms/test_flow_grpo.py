from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowbench.algorithms.flow_grpo import FlowGrpo
from flowbench.models.flow import SAMPLERS, Step, flow_sde_step, gaussian_log_prob
from flowbench.rollout import Rollout, transitions

ETA = 0.7


class ScalarFlow:
    """v = theta x + 0.2 on independent dimensions, sampled by Flow-SDE; the reference has theta = 0.3."""

    sampler = SAMPLERS["flow-sde"]

    def __init__(self, theta: float) -> None:
        self.theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)

    def velocity(self, x: torch.Tensor, weights: str = "current") -> torch.Tensor:
        return (self.theta if weights == "current" else 0.3) * x + 0.2

    def transition(self, x: torch.Tensor, sigma: Any, sigma_next: Any, cond: object, weights: str = "current") -> Step:
        return flow_sde_step(x, self.velocity(x, weights), sigma, sigma_next, ETA)

    def rollout(self, noise: torch.Tensor, toys: Any, **parts: Any) -> Rollout:
        """noise (steps + 1, n, 1, 1, D): the start, and what each step adds."""
        n, sigmas = noise.shape[1], torch.linspace(1, 0, len(noise), dtype=torch.float64)
        states, log_probs = [noise[0]], []
        with torch.no_grad():
            for (sigma, sigma_next), extra in zip(pairwise(sigmas), noise[1:], strict=True):
                step = self.transition(states[-1], sigma.expand(n), sigma_next.expand(n), None)
                states.append(step.mean + step.std * extra)
                log_probs.append(gaussian_log_prob(states[-1], step))
        reward = -(states[-1] - 1.0).square().flatten(1).mean(1)
        paths = {"sigmas": sigmas, "states": torch.stack(states, 1), "log_prob": torch.stack(log_probs, 1)}
        return toys.make_rollout(states[-1], reward, **paths, **parts)


@pytest.mark.parametrize("over_step", [True, False])
def test_its_kl_is_the_papers_closed_form_in_the_velocity(toys: Any, draw: Any, over_step: bool):
    """|d| / 2 (g (1 - sigma) / (2 sigma) + 1 / g)^2 mean_d (v - v_ref)^2 with g = eta sqrt(sigma / (1 - sigma)).

    At sigma = 1 the sampler takes g from the next sigma. The reference code's KL lacks the division by |d|.
    """
    policy = ScalarFlow(0.5)
    batch = transitions(policy.rollout(draw(5, 3, 1, 1, 2), toys), torch.zeros(3, dtype=torch.float64))
    losses = [
        FlowGrpo(FlowGrpo.Config(beta=beta, kl_over_step=over_step)).loss(policy, batch).policy for beta in (0.3, 0.0)
    ]
    x, sigma = batch.state()
    d = sigma - batch.transition().sigma_next
    g = ETA * torch.sqrt(sigma / (1 - torch.where(sigma >= 1, sigma - d, sigma)))
    difference = (policy.velocity(x) - policy.velocity(x, "reference")).square().flatten(1).mean(1)
    kl = d / 2 * (g * (1 - sigma) / (2 * sigma) + 1 / g) ** 2 * difference
    expected = kl if over_step else kl * d
    assert torch.allclose((losses[0] - losses[1]) / 0.3, expected, rtol=1e-9)


def test_its_kl_is_that_of_torchs_normals_per_dimension(toys: Any, draw: Any):
    policy = ScalarFlow(0.5)
    batch = transitions(policy.rollout(draw(5, 3, 1, 1, 2), toys), torch.zeros(3, dtype=torch.float64))
    loss = FlowGrpo(FlowGrpo.Config(beta=1.0, kl_over_step=True)).loss(policy, batch).policy
    taken = batch.transition()
    p, q = (
        torch.distributions.Normal(step.mean, step.std.expand_as(step.mean))
        for step in (
            policy.transition(taken.x, taken.sigma, taken.sigma_next, None, weights)
            for weights in ("current", "reference")
        )
    )
    assert torch.allclose(loss, torch.distributions.kl_divergence(p, q).mean((1, 2, 3)))


def test_at_ratio_one_its_expected_gradient_is_that_of_the_samplers_expected_reward(toys: Any, draw: Any):
    """Against finite differences of E[r] with common noise.

    The surrogate's gradient is a mean over the 4 steps, the 2 dimensions and divided by the reward's deviation; undone
    here. The tolerance covers the estimator's error, a few times 1 / sqrt(n).
    """
    n, steps, dimensions, h = 60_000, 4, 2, 1e-2
    noise = draw(steps + 1, n, 1, 1, dimensions)
    up, down = (ScalarFlow(0.5 + d).rollout(noise, toys).reward for d in (h, -h))
    exact = ((up - down) / (2 * h)).mean().item()

    policy = ScalarFlow(0.5)
    rollout = policy.rollout(noise, toys)
    algorithm = FlowGrpo(FlowGrpo.Config(beta=0.0, advantage_clip=1e9, clip_range=0.5))
    algorithm.setup(SimpleNamespace())
    loss = algorithm.loss(policy, algorithm.prepare(rollout)).policy.mean()
    scale = steps * dimensions * (rollout.reward.std(correction=0) + 1e-4).item()
    estimate = -scale * torch.autograd.grad(loss, policy.theta)[0].item()
    assert abs(exact) > 0.3
    assert estimate == pytest.approx(exact, rel=0.04)


def test_with_a_window_its_gradient_is_that_of_the_windows_steps_alone(toys: Any, draw: Any):
    """MixGRPO: rows without a density are left out, and the others are as without the window."""
    policy = ScalarFlow(0.5)
    rollout = policy.rollout(draw(5, 3, 1, 1, 2), toys)
    rollout.log_prob[:, [0, 3]] = torch.inf
    algorithm = FlowGrpo(FlowGrpo.Config())
    algorithm.setup(SimpleNamespace())
    batch = algorithm.prepare(rollout)
    assert len(batch) == 6
    assert set(batch.transition().sigma.tolist()) == {0.75, 0.5}
    assert torch.equal(batch.transition().x, rollout.states[:, 1:3].flatten(0, 1))


REWARD, GROUP = torch.tensor([0.0, 2.0, 10.0, 20.0]), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(("global_std", "std"), [(True, [7.8740] * 4), (False, [1.0, 1.0, 5.0, 5.0])])
def test_advantages_are_over_the_deviation_of_all_images_or_of_the_prompts(
    toys: Any, draw: Any, global_std: bool, std: list[float]
):
    """Deviations worked out by hand, of the population: 62 is the variance of 0, 2, 10, 20."""
    rollout = replace(ScalarFlow(0.5).rollout(draw(5, 4, 1, 1, 2), toys, group=GROUP), reward=REWARD)
    advantage = FlowGrpo(FlowGrpo.Config(global_std=global_std)).advantages(rollout)
    expected = [a / (s + 1e-4) for a, s in zip([-1.0, 1.0, -5.0, 5.0], std, strict=True)]
    assert advantage.tolist() == pytest.approx(expected, rel=1e-4)
    bounded = FlowGrpo(FlowGrpo.Config(global_std=global_std, advantage_clip=0.25)).advantages(rollout)
    assert bounded.abs().max() == 0.25


def test_images_of_zero_advantage_are_not_trained_on(toys: Any, draw: Any):
    """Seven equal rewards that floats cannot hold exactly have an advantage of exactly 0."""
    policy, group = ScalarFlow(0.5), torch.tensor([0] * 7 + [1] * 2)
    rollout = replace(
        policy.rollout(draw(5, 9, 1, 1, 2), toys, group=group), reward=torch.tensor([0.1] * 7 + [0.3, 0.7])
    )
    algorithm = FlowGrpo(FlowGrpo.Config())
    algorithm.setup(SimpleNamespace())
    batch = algorithm.prepare(rollout)
    assert torch.equal(batch.x0[::4], rollout.x0[7:])
    assert len(batch) == 8
    alike = algorithm.prepare(replace(rollout, reward=(group + 0.1)))
    assert len(alike) == 36  # with nothing to learn from, only the KL
