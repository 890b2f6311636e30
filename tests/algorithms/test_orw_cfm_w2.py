from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import minibatch_loss

from flowbench.algorithms.orw_cfm_w2 import OrwCfmW2
from flowbench.rollout import Batch, Conditioning


def batch_of(x0: torch.Tensor, reward: torch.Tensor) -> Batch:
    cond = Conditioning({}, torch.zeros(len(x0), dtype=torch.int64))
    return Batch(("p",) * len(x0), cond, x0, reward)


def test_its_loss_is_the_weighted_fit_plus_the_distance_to_the_reference():
    generator = torch.Generator().manual_seed(0)
    v, v_ref, u = torch.randn(3, 5, 2, 3, 3, generator=generator, dtype=torch.float64)
    reward = torch.randn(5, generator=generator, dtype=torch.float64)
    policy: Any = SimpleNamespace(
        draw_noise=lambda n, device=None: u,  # of images that are 0
        draw_sigmas=lambda n: torch.full((n,), 0.5),
        velocity=lambda x, sigma, cond, weights="current": {"current": v, "reference": v_ref}[weights],
    )
    loss = minibatch_loss(
        OrwCfmW2(OrwCfmW2.Config(tau=0.8, alpha=0.3)), policy, batch_of(torch.zeros_like(u), reward)
    ).policy
    for i in range(5):
        fit, w2 = ((v[i] - u[i]) ** 2).mean(), ((v[i] - v_ref[i]) ** 2).mean()
        assert loss[i].item() == pytest.approx((torch.exp(0.8 * reward[i]) * fit + 0.3 * w2).item())


def test_one_step_moves_a_gaussian_as_theory_says():
    """alpha = 0, linear r = c x on N(mu, S): the exact minimiser's data mean is mu + tau S c with variance S.

    The minimiser v* = E[w u | x] / E[w | x] is that of the re-weighted data exp(tau r) p, so that its x0_hat at small
    sigma, averaged over the weighted states, has the tilted mean.
    """
    generator = torch.Generator().manual_seed(3)
    n, mu, s, tau, c, sigma = 200_000, 0.4, 0.5, 0.7, 1.2, 0.3
    x0 = mu + s**0.5 * torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)
    eps = torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)
    # The tilted data is Gaussian, hence the minimiser is affine in x: v = a + b x.
    coefficients = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    policy: Any = SimpleNamespace(
        draw_noise=lambda n, device=None: eps,
        draw_sigmas=lambda n: torch.full((n,), sigma, dtype=torch.float64),
        velocity=lambda x, sigma, cond: coefficients[0] + coefficients[1] * x,
    )
    algorithm = OrwCfmW2(OrwCfmW2.Config(tau=tau, alpha=0.0))
    rows = batch_of(x0, c * x0.flatten())

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(
            minibatch_loss(algorithm, policy, rows).policy.mean(), coefficients, create_graph=True
        )[0]

    # The loss is quadratic: one Newton step reaches its minimum.
    slope = gradient()
    hessian = torch.stack([torch.autograd.grad(g, coefficients, retain_graph=True)[0] for g in slope])
    coefficients.data -= torch.linalg.solve(hessian, slope.detach())
    assert gradient().abs().max() < 1e-9

    mean = mu + tau * s * c
    spread = (1 - sigma) ** 2 * s + sigma**2
    b = (sigma - (1 - sigma) * s) / spread
    a = -mean - b * (1 - sigma) * mean
    assert coefficients[1].item() == pytest.approx(b, abs=0.02)
    assert coefficients[0].item() == pytest.approx(a, abs=0.02)
