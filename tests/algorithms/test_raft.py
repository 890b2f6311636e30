from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small import minibatch_loss

from flowbench.algorithms.raft import Raft


def kept(algorithm: Raft, toys: Any, reward: torch.Tensor, group: torch.Tensor) -> list[int]:
    x0 = torch.arange(len(reward)).float().view(-1, 1, 1, 1)
    return algorithm.prepare(toys.make_rollout(x0, reward, group)).x0.flatten().int().tolist()


@pytest.mark.parametrize(("share", "expected"), [(0.25, [1, 4]), (0.5, [1, 2, 4, 6]), (0.6, [0, 1, 2, 4, 5, 6])])
def test_the_best_share_of_each_prompt_is_kept_rounded_up(toys: Any, share: float, expected: list[int]):
    reward = torch.tensor([0.3, 0.9, 0.5, 0.1, 8.0, 6.0, 7.0, 5.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert kept(Raft(Raft.Config(share=share)), toys, reward, group) == expected


def test_ties_do_not_change_the_number_kept(toys: Any):
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    assert kept(Raft(Raft.Config(share=0.5)), toys, torch.ones(6), group) == [0, 1, 4]


def test_kept_images_have_a_row_per_state(toys: Any):
    algorithm = Raft(Raft.Config(share=0.5, states_per_image=3))
    assert kept(algorithm, toys, torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.int64)) == [1, 1, 1]


def test_its_minimiser_is_the_kept_images_velocity_mixed_with_the_references(toys: Any, draw: Any):
    """v* = (E[u | x, kept] + alpha v_ref) / (1 + alpha)."""
    u, v_ref, alpha = draw(10, 1, 1, 3), draw(3), 0.4
    v = ((u.flatten(1).mean(0) + alpha * v_ref) / (1 + alpha)).requires_grad_()
    rows = toys.make_rows(torch.zeros_like(u), torch.zeros(10, dtype=torch.float64))
    loss = minibatch_loss(Raft(Raft.Config(alpha=alpha)), toys.OneState(u, current=v, reference=v_ref), rows).policy
    assert torch.autograd.grad(loss.mean(), v)[0].abs().max() < 1e-12


def test_one_round_moves_a_gaussians_mean_by_that_of_the_best_of_two(toys: Any, draw: Any):
    """The better of two draws from N(mu, s^2) has the mean mu + s / sqrt(pi) and the variance s^2 (1 - 1 / pi).

    At sigma = 1 the state says nothing of the image, so that v* = eps - E[x0 | kept]; the tolerance is five standard
    errors of a mean over the pairs. Theory gives no other fixed point than the best image: each round adds a step
    as long as the images differ.
    """
    pairs, mu, s = 10_000, 0.4, 0.7
    x0 = mu + s * draw(2 * pairs, 1, 1, 1)
    group = torch.arange(pairs).repeat_interleave(2)
    algorithm = Raft(Raft.Config(share=0.5))
    batch = algorithm.prepare(toys.make_rollout(x0, x0.flatten(), group))
    eps = torch.tensor(1.3, dtype=torch.float64)
    v = (eps - mu - s / math.sqrt(math.pi)).view(1).requires_grad_()
    policy = toys.OneState(eps.expand_as(batch.x0), sigma=1.0, current=v)
    gradient = torch.autograd.grad(minibatch_loss(algorithm, policy, batch).policy.mean(), v)[0].item()
    error = s * math.sqrt((1 - 1 / math.pi) / pairs)
    assert abs(gradient) < 5 * 2 * error  # the gradient is twice the distance to the minimiser
    assert 5 * error < 0.1 * s / math.sqrt(math.pi)
