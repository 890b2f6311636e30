from __future__ import annotations

from typing import Any

import pytest
import torch
from small import minibatch_loss

from flowbench.algorithms.awm import Awm
from flowbench.models.flow import velocity_error

D = 3
BARE = {"beta": 0.0, "beta_average": 0.0}


def loss_of(toys: Any, config: dict[str, Any], u: torch.Tensor, advantage: torch.Tensor, **views: torch.Tensor):
    return minibatch_loss(
        Awm(Awm.Config(**config)), toys.OneState(u, **views), toys.make_rows(torch.zeros_like(u), advantage)
    )


def gradient_of(toys: Any, config: dict[str, Any], u: torch.Tensor, advantage: torch.Tensor, **views: torch.Tensor):
    v = views.pop("current").clone().requires_grad_()
    loss = loss_of(toys, config, u, advantage, current=v, **views).policy.mean()
    return torch.autograd.grad(loss, v)[0]


def test_at_the_old_policy_its_gradient_is_that_of_the_advantage_weighted_matching_loss(toys: Any, draw: Any):
    """rho = 1 there, so that the gradient is that of A mean_d (v - u)^2."""
    u, advantage, v_old = draw(20, 1, 1, D), draw(20), draw(D)
    v = v_old.clone().requires_grad_()
    weighted = (advantage * velocity_error(v.expand_as(u), u)).mean()
    (expected,) = torch.autograd.grad(weighted, v)
    ours = gradient_of(toys, {"power": None, **BARE}, u, advantage, current=v_old, old=v_old)
    assert torch.allclose(ours, expected, atol=1e-12)


def test_the_huber_form_is_that_of_the_formula_and_weighs_by_sigma(draw: Any):
    error, sigma = draw(6).square(), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    ours = Awm(Awm.Config(power=0.25)).log_prob(error, sigma)
    assert torch.allclose(ours, -4 * sigma * ((error + 1e-10) ** 0.25 - 1e-10**0.25))
    plain = Awm(Awm.Config(power=1.0)).log_prob(error, sigma)
    assert torch.allclose(plain, -sigma * error)
    assert torch.equal(Awm(Awm.Config(power=None)).log_prob(error, sigma), -error)


@pytest.mark.parametrize("power", [None, 0.25])
def test_its_gradient_equals_finite_differences_away_from_the_old_policy(toys: Any, draw: Any, power: float | None):
    u, advantage = draw(6, 1, 1, D), draw(6)
    v, v_old, v_ref, v_average = draw(D), draw(D), draw(D), draw(D)
    config = {"power": power, "clip_range": 0.2, "beta": 0.1, "beta_average": 0.3}
    views = {"old": v_old, "reference": v_ref, "average": v_average}
    gradient = gradient_of(toys, config, u, advantage, current=v, **views)
    h = 1e-6
    for i, unit in enumerate(torch.eye(D, dtype=torch.float64)):
        up, down = (loss_of(toys, config, u, advantage, current=v + d * unit, **views).policy.mean() for d in (h, -h))
        assert gradient[i].item() == pytest.approx(((up - down) / (2 * h)).item(), abs=1e-7)


@pytest.mark.parametrize(("advantage", "closer", "flows"), [(1.0, True, False), (1.0, False, True), (-1.0, True, True)])
def test_clipping_stops_an_image_that_the_policy_has_moved_to_far_enough(
    toys: Any, advantage: float, closer: bool, flows: bool
):
    """logp = -(v - u)^2 with u = 2, v_old = 1: v = 1.5 gives rho = e^0.75, v = 0.5 gives rho = e^-1.25."""
    u = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    v, v_old = torch.tensor([1.5 if closer else 0.5], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    a = torch.tensor([advantage], dtype=torch.float64)
    config = {"power": None, "clip_range": 0.2, **BARE}
    gradient = gradient_of(toys, config, u, a, current=v, old=v_old).item()
    rho = torch.tensor(0.75 if closer else -1.25).double().exp().item()
    slope = -2 * (v - u).item()  # of logp
    assert gradient == pytest.approx(-advantage * rho * slope if flows else 0.0)


def test_a_policy_is_at_rest_where_advantage_and_pull_to_the_reference_balance(toys: Any, draw: Any):
    """For centred advantages (E[A | x] = 0) on-policy updates rest at v_ref - E[A v_old - A u | x] / beta.

    That is v_ref + E[A u | x] / beta, ADRPO's minimiser with beta0 = beta. Theory gives no minimiser of the loss
    itself: where E[A | x] < 0 it is not convex, and away from v_old the ratio changes the weights.
    """
    u, advantage, v_ref, beta = draw(40, 1, 1, D), draw(40), draw(D), 0.8
    advantage = advantage - advantage.mean()
    rest = v_ref + (advantage[:, None] * u.flatten(1)).mean(0) / beta
    config = {"power": None, "beta": beta, "beta_average": 0.7}
    at_rest = gradient_of(toys, config, u, advantage, current=rest, old=rest, average=rest, reference=v_ref)
    assert at_rest.abs().max() < 1e-12
    start = gradient_of(toys, config, u, advantage, current=v_ref, old=v_ref, average=v_ref, reference=v_ref)
    assert torch.dot(-start, rest - v_ref) > 0


def test_advantages_are_normalised_clipped_and_scaled_to_one(toys: Any, draw: Any):
    algorithm = Awm(Awm.Config(advantage_clip=1.0))
    algorithm.setup(toys.OneState(draw(1, 1, 1, D)))
    reward = torch.tensor([0.0, 2.0, 4.0, 30.0])
    batch = algorithm.prepare(toys.make_rollout(torch.zeros(4, 1, 1, 1), reward, torch.tensor([0, 0, 1, 1])))
    assert batch.advantage[2:].tolist() == pytest.approx([-13 / reward.std().item(), 13 / reward.std().item()])
    assert batch.advantage[:2].tolist() == pytest.approx([-1 / reward.std().item(), 1 / reward.std().item()])
    halved = Awm(Awm.Config(advantage_clip=0.5))
    halved.setup(toys.OneState(draw(1, 1, 1, D)))
    assert halved.prepare(toys.make_rollout(torch.zeros(4, 1, 1, 1), reward)).advantage.abs().max() == 1.0


def test_the_old_view_is_renewed_each_iteration_and_the_average_follows_ever_more_slowly(toys: Any, draw: Any):
    policy = toys.OneState(draw(1, 1, 1, D))
    config = Awm.Config(average_ramp=0.2, average_decay=0.3)
    first, second = Awm(config), Awm(config)
    for algorithm in (first, second):
        algorithm.setup(policy)
    policy.updates.clear()
    rollout = toys.make_rollout(torch.zeros(2, 1, 1, 1), torch.tensor([0.0, 1.0]))
    first.prepare(rollout)
    first.after_iteration(policy)
    second.load_state_dict(first.state_dict())
    second.prepare(rollout)
    second.after_iteration(policy)
    assert policy.updates == [("old", 0.0), ("average", 0.2), ("old", 0.0), ("average", 0.3)]
