from __future__ import annotations

from typing import Any

import pytest
import torch
from small import minibatch_loss

from flowbench.algorithms.adrpo import Adrpo

D = 3


def loss_at(v: torch.Tensor, toys: Any, u: torch.Tensor, advantage: torch.Tensor, v_ref: torch.Tensor, beta0: float):
    policy = toys.OneState(u, current=v, reference=v_ref)
    rows = toys.make_rows(torch.zeros_like(u), advantage)
    return minibatch_loss(Adrpo(Adrpo.Config(beta0=beta0)), policy, rows).policy.mean()


def test_its_minimiser_is_the_reference_plus_the_mean_advantage_weighted_difference(toys: Any, draw: Any):
    """v* = v_ref + E[A (u - v_ref) | x] / beta0; the gradient there is zero to rounding."""
    u, advantage, v_ref, beta0 = draw(50, 1, 1, D), draw(50) * 3, draw(D), 0.7
    exact = v_ref + (advantage[:, None] * (u.flatten(1) - v_ref)).mean(0) / beta0
    for v, stationary in ((exact, True), (exact + 0.1, False)):
        v = v.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_at(v, toys, u, advantage, v_ref, beta0), v)
        assert bool(gradient.abs().max() < 1e-12) is stationary


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_its_curvature_is_beta0_whatever_the_advantages(toys: Any, draw: Any, scale: float):
    """Also where A > beta0 makes the second term's weight negative, so that the loss is always convex."""
    u, advantage, v_ref, beta0 = draw(20, 1, 1, D), draw(20) * scale, draw(D), 0.3

    def loss(v: torch.Tensor) -> torch.Tensor:
        return loss_at(v, toys, u, advantage, v_ref, beta0)

    hessian = torch.autograd.functional.hessian(loss, draw(D))
    assert torch.allclose(hessian, 2 * beta0 / D * torch.eye(D, dtype=torch.float64), atol=1e-11)


def test_a_good_image_attracts_and_a_bad_one_repels(toys: Any, draw: Any):
    u, v_ref = draw(1, 1, 1, D), torch.zeros(D, dtype=torch.float64)
    for sign in (1.0, -1.0):
        v = v_ref.clone().requires_grad_()
        advantage = torch.tensor([sign], dtype=torch.float64)
        (gradient,) = torch.autograd.grad(loss_at(v, toys, u, advantage, v_ref, 1.0), v)
        assert torch.allclose(-gradient, sign * 2 / D * u.flatten())


def test_advantages_are_rewards_above_the_prompts_mean(toys: Any):
    reward, group = torch.tensor([1.0, 3.0, 10.0, 30.0]), torch.tensor([0, 0, 1, 1])
    algorithm = Adrpo(Adrpo.Config(states_per_image=2))
    batch = algorithm.prepare(toys.make_rollout(torch.zeros(4, 1, 1, 1), reward, group))
    assert batch.advantage.tolist() == [-1.0, 1.0, -10.0, 10.0] * 2
    assert batch.group.tolist() == [0, 0, 2, 2, 1, 1, 3, 3]  # the images of a prompt that are the same copy
