from __future__ import annotations

from typing import Any

import pytest
import torch
from small import minibatch_loss

from flowbench.algorithms.adrpo import Adrpo
from flowbench.algorithms.nft import Nft
from flowbench.toolkit.matching import Renoised

D = 3
PLAIN = {"adaptive": False, "kl": 0.0}


def gradient_at(v: torch.Tensor, toys: Any, algorithm: Any, rows: Any, u: torch.Tensor, **views: torch.Tensor):
    v = v.clone().requires_grad_()
    loss = minibatch_loss(algorithm, toys.OneState(u, current=v, **views), rows).policy.mean()
    return torch.autograd.grad(loss, v)[0]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_its_minimiser_is_the_old_velocity_plus_the_mean_weighted_difference(toys: Any, draw: Any, beta: float):
    """v* = v_old + E[(2 r - 1)(u - v_old) | x] / beta."""
    u, advantage, v_old = draw(50, 1, 1, D), 4 * draw(50), draw(D)
    r = (advantage / 5 / 2 + 0.5).clamp(0, 1)
    assert 0 < ((r == 0) | (r == 1)).sum() < 50  # some are clipped
    exact = v_old + ((2 * r - 1)[:, None] * (u.flatten(1) - v_old)).mean(0) / beta
    algorithm, rows = Nft(Nft.Config(beta=beta, **PLAIN)), toys.make_rows(torch.zeros_like(u), advantage)
    assert gradient_at(exact, toys, algorithm, rows, u, old=v_old).abs().max() < 1e-12 / beta
    assert gradient_at(exact + 0.1, toys, algorithm, rows, u, old=v_old).abs().max() > 1e-3


def test_its_gradient_is_adrpos_from_the_old_policy(toys: Any, draw: Any):
    """With v_old as ADRPO's reference, the clipped advantage and beta0 = advantage_clip beta; at any v."""
    u, advantage, v_old, v = draw(30, 1, 1, D), 4 * draw(30), draw(D), draw(D)
    nft = Nft(Nft.Config(beta=0.3, advantage_clip=2.0, **PLAIN))
    adrpo = Adrpo(Adrpo.Config(beta0=2.0 * 0.3))
    x0 = torch.zeros_like(u)
    ours = gradient_at(v, toys, nft, toys.make_rows(x0, advantage), u, old=v_old)
    theirs = gradient_at(v, toys, adrpo, toys.make_rows(x0, advantage.clamp(-2, 2)), u, reference=v_old)
    assert ours.norm() > 0.1
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_the_adaptive_error_is_that_of_x0_over_its_absolute_value(draw: Any):
    """With x0_hat = x - sigma w: mean_d (x0_hat - x0)^2 / mean_d |x0_hat - x0|, the denominator without gradient."""
    x0, eps = draw(2, 4, 1, 2, 2)
    sigma = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    s = sigma[:, None, None, None]
    x, w = (1 - s) * x0 + s * eps, draw(4, 1, 2, 2).requires_grad_()
    ours = Nft(Nft.Config()).error(w, Renoised(x, sigma, eps - x0))
    difference = x - s * w - x0
    expected = difference.square().mean((1, 2, 3)) / difference.abs().mean((1, 2, 3)).detach()
    assert torch.allclose(ours, expected, atol=1e-12)
    gradients = [torch.autograd.grad(e.sum(), w, retain_graph=True)[0] for e in (ours, expected)]
    assert torch.allclose(*gradients, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_equal_rewards_leave_the_old_policy_where_it_is(toys: Any, draw: Any, adaptive: bool):
    u, v_old = draw(20, 1, 1, D), draw(D)
    rows = toys.make_rows(torch.zeros_like(u), torch.zeros(20, dtype=torch.float64))
    algorithm = Nft(Nft.Config(adaptive=adaptive, kl=0.0))
    assert gradient_at(v_old, toys, algorithm, rows, u, old=v_old).abs().max() < 1e-12


def test_the_pull_to_the_reference_is_added_with_its_weight(toys: Any, draw: Any):
    u, v, v_old, v_ref = draw(5, 1, 1, D), draw(D), draw(D), draw(D)
    rows = toys.make_rows(torch.zeros_like(u), draw(5))
    with_kl, without = (
        minibatch_loss(Nft(Nft.Config(kl=kl)), toys.OneState(u, current=v, old=v_old, reference=v_ref), rows).policy
        for kl in (0.2, 0.0)
    )
    assert torch.allclose(with_kl - without, 0.2 * (v - v_ref).square().mean().expand(5))


def test_the_old_policy_follows_ever_more_slowly_also_after_a_resume(toys: Any, draw: Any):
    """min(old_decay, old_ramp max(0, k - old_start)) after iteration k."""
    policy = toys.OneState(draw(1, 1, 1, D))
    config = Nft.Config(old_ramp=0.2, old_decay=0.5, old_start=2)
    first, second = Nft(config), Nft(config)
    for algorithm in (first, second):
        algorithm.setup(policy)
    policy.updates.clear()
    for _ in range(4):
        first.after_iteration(policy)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.after_iteration(policy)
    assert [name for name, _ in policy.updates] == ["old"] * 6
    assert [decay for _, decay in policy.updates] == pytest.approx([0.0, 0.0, 0.2, 0.4, 0.5, 0.5])


def test_images_come_from_the_old_policy():
    assert "old" in Nft.info.needs
