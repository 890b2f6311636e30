from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small import minibatch_loss

from flowbench.algorithms.online_dpo import OnlineDpo
from flowbench.errors import RunError
from flowbench.models.flow import velocity_error
from flowbench.rollout import Batch

D = 3


class Shared:
    """All rows at sigma = 1 and the same noise: one state, where u = eps - x0 and the velocity is a free vector."""

    def __init__(self, eps: torch.Tensor, v: torch.Tensor, v_ref: torch.Tensor) -> None:
        self.eps, self.views = eps, {"current": v, "reference": v_ref}

    def draw_noise(self, n: int, device: torch.device | None = None) -> torch.Tensor:
        return self.eps.expand(n, *self.eps.shape)

    def draw_sigmas(self, n: int) -> torch.Tensor:
        return torch.ones(n, dtype=self.eps.dtype)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, cond: Any, weights: str = "current") -> torch.Tensor:
        return self.views[weights].expand_as(x)


def rows(toys: Any, better: torch.Tensor, worse: torch.Tensor, margin: torch.Tensor) -> Batch:
    return toys.make_rows(better, margin, rival=worse)


def test_pairs_are_the_best_and_the_worst_image_of_each_prompt(toys: Any):
    x0 = torch.arange(7.0).view(7, 1, 1, 1)
    reward, group = torch.tensor([0.2, 0.9, 0.4, 5.0, 5.0, 1.0, 3.0]), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    batch = OnlineDpo(OnlineDpo.Config(states_per_pair=2)).prepare(toys.make_rollout(x0, reward, group))
    better, worse = batch.pair()
    assert better.flatten().tolist() == [1, 3, 6] * 2
    assert worse.flatten()[[0, 2]].tolist() == [0, 5]
    assert batch.advantage.tolist() == pytest.approx([0.7, 0.0, 2.0] * 2)
    assert batch.select(torch.tensor([2])).pair()[1].flatten().tolist() == [5]


def test_rows_without_a_rival_are_refused(toys: Any):
    with pytest.raises(RunError, match="these rows are no pairs"):
        toys.make_rows(torch.zeros(2, 1, 1, 1), torch.zeros(2)).pair()


def test_its_loss_is_that_of_diffusion_dpo_in_velocity_form(toys: Any, draw: Any):
    eps, v, v_ref, better, worse = draw(1, 1, D), draw(D), draw(D), draw(4, 1, 1, D), draw(4, 1, 1, D)
    margin = torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
    loss = minibatch_loss(
        OnlineDpo(OnlineDpo.Config(beta=7.0)), Shared(eps, v, v_ref), rows(toys, better, worse, margin)
    )

    def gap(x0: torch.Tensor) -> torch.Tensor:
        u = eps - x0
        return velocity_error(v.expand_as(u), u) - velocity_error(v_ref.expand_as(u), u)

    expected = -torch.log(torch.sigmoid(-3.5 * (gap(better) - gap(worse))))
    assert torch.allclose(loss.policy, expected * (margin > 0))
    assert loss.policy[2] == 0.0  # images that score the same are no pair


def test_at_the_reference_it_moves_from_the_worse_image_to_the_better(toys: Any, draw: Any):
    """The loss is log 2 there, and -d loss / d v = beta / (2 D) (u_better - u_worse), in x0 the other way round."""
    eps, v_ref, better, worse = draw(1, 1, D), draw(D), draw(1, 1, 1, D), draw(1, 1, 1, D)
    v = v_ref.clone().requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    loss = minibatch_loss(
        OnlineDpo(OnlineDpo.Config(beta=7.0)), Shared(eps, v, v_ref), rows(toys, better, worse, one)
    ).policy
    assert loss.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    assert torch.allclose(-gradient, 7.0 / (2 * D) * (worse - better).flatten())


def test_where_two_images_win_in_turn_it_rests_at_bradley_terrys_log_odds(toys: Any, draw: Any):
    """a beats b in 3 of 4 rows. With one state the logit is beta mean_d (v - v_ref)(u_a - u_b) for a against b, so that
    the loss is a logistic regression whose minimum has that logit at log 3."""
    eps, v_ref, a, b, beta = draw(1, 1, D), draw(D), draw(1, 1, 1, D), draw(1, 1, 1, D), 7.0
    better, worse = torch.cat([a, a, a, b]), torch.cat([b, b, b, a])
    direction = (b - a).flatten()  # u_a - u_b
    shift = math.log(3) * D / beta * direction / direction.square().sum()
    batch = rows(toys, better, worse, torch.ones(4, dtype=torch.float64))
    for scale, sign in ((1.0, 0.0), (0.5, -1.0), (1.5, 1.0)):
        v = (v_ref + scale * shift).requires_grad_()
        loss = minibatch_loss(OnlineDpo(OnlineDpo.Config(beta=beta)), Shared(eps, v, v_ref), batch).policy.mean()
        slope = torch.dot(torch.autograd.grad(loss, v)[0], shift).item()
        assert (abs(slope) < 1e-12) if sign == 0 else slope * sign > 1e-3


def test_where_one_image_always_wins_there_is_no_fixed_point(toys: Any, draw: Any):
    """Theory gives none for decided pairs: the loss falls along the margin for ever, only ever more slowly."""
    eps, v_ref, better, worse = draw(1, 1, D), draw(D), draw(1, 1, 1, D), draw(1, 1, 1, D)
    direction, batch = (worse - better).flatten(), rows(toys, better, worse, torch.ones(1, dtype=torch.float64))
    slopes = []
    for distance in (0.0, 1.0, 3.0):
        v = (v_ref + distance * direction).requires_grad_()
        loss = minibatch_loss(OnlineDpo(OnlineDpo.Config(beta=2.0)), Shared(eps, v, v_ref), batch).policy.sum()
        slopes.append(torch.dot(torch.autograd.grad(loss, v)[0], direction).item())
    assert slopes[0] < slopes[1] < slopes[2] < 0
