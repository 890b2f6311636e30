"""What DDPO, DPOK, Flow-GRPO and AWM share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flowbench.rollout import Conditioning, Rollout
from flowbench.toolkit.policy_gradient import StepConfig, StepPolicyGradient, clipped_surrogate


@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("rho", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0])
def test_clipping_stops_the_gradient_exactly_where_the_formula_says(advantage: float, rho: float):
    """Flat for A > 0 above 1.2 and for A < 0 below 0.8; elsewhere d loss / d log rho = -A rho."""
    log_ratio = torch.tensor([rho], dtype=torch.float64).log().requires_grad_()
    loss, metrics = clipped_surrogate(torch.tensor([advantage], dtype=torch.float64), log_ratio, 0.2)
    bounded = min(max(rho, 0.8), 1.2)
    assert loss.item() == pytest.approx(max(-advantage * rho, -advantage * bounded))
    stopped = (advantage > 0 and rho > 1.2) or (advantage < 0 and rho < 0.8)
    expected = 0.0 if stopped else -advantage * rho
    assert torch.autograd.grad(loss.sum(), log_ratio)[0].item() == pytest.approx(expected)
    assert metrics["clipped"].item() == float(not 0.8 <= rho <= 1.2)


def rollout_of(log_prob: torch.Tensor, reward: torch.Tensor, group: torch.Tensor) -> Rollout:
    n, steps = log_prob.shape
    cond = Conditioning({}, torch.zeros(n, dtype=torch.int64))
    states = torch.zeros(n, steps + 1, 1, 1, 1)
    x0, sigmas = states[:, -1], torch.linspace(1, 0, steps + 1)
    return Rollout(0, ("p",) * n, group, cond, sigmas, x0, x0, reward, states=states, log_prob=log_prob)


def test_advantages_are_over_the_iterations_deviation_and_clipped():
    reward, group = torch.tensor([0.0, 2.0, 10.0, 20.0]), torch.tensor([0, 0, 1, 1])
    rollout = rollout_of(torch.zeros(4, 2), reward, group)
    expected = torch.tensor([-1.0, 1.0, -5.0, 5.0]) / (reward.std() + 1e-6)
    assert torch.allclose(rollout.normalized_advantage(5.0), expected)
    assert rollout.normalized_advantage(0.25).abs().max() == 0.25


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_a_share_of_the_steps_is_drawn_from_those_that_have_a_density(wanted: int):
    log_prob = torch.zeros(50, 6)
    log_prob[:, [0, 4, 5]] = torch.inf
    algorithm = StepPolicyGradient(StepConfig(steps_per_image=wanted))
    generator = torch.Generator().manual_seed(0)
    algorithm.setup(SimpleNamespace(draw_noise=lambda n, device: torch.randn(n, 1, 1, 1, generator=generator)))
    group = torch.zeros(50, dtype=torch.int64)
    batch = algorithm.prepare(rollout_of(log_prob, torch.arange(50.0), group))
    chosen = batch.transition().sigma.view(50, wanted)
    density = torch.linspace(1, 0, 7)[1:4].tolist()
    assert set(chosen.flatten().tolist()) == set(density)
    assert all(len(set(row.tolist())) == wanted for row in chosen)
    assert torch.equal(batch.advantage.view(50, wanted)[:, 0], batch.advantage.view(50, wanted)[:, -1])
