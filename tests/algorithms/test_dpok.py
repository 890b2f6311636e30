from __future__ import annotations

from typing import Any

import pytest
import torch

from flowbench.algorithms.ddpo import Ddpo
from flowbench.algorithms.dpok import Dpok

D = 3


def prepared(algorithm: Any, rollout: Any) -> tuple[Any, Any]:
    algorithm.setup(None)
    return algorithm, algorithm.prepare(rollout)


def test_its_penalty_is_the_exact_kl_of_torchs_normals(toys: Any, draw: Any):
    """Summed over dimensions and divided by their number, as the log-ratio is."""
    mean, reference, std = draw(D), draw(D), 0.6
    policy = toys.OneStep(mean, reference, std)
    rollout = policy.rollout(draw(5, 1, 1, D), draw(D))
    losses = []
    for beta in (0.0, 0.25):
        algorithm, batch = prepared(Dpok(Dpok.Config(beta=beta)), rollout)
        losses.append(algorithm.loss(policy, batch))
    p, q = (torch.distributions.Normal(m, std) for m in (mean, reference))
    kl = torch.distributions.kl_divergence(p, q).sum()
    assert torch.allclose(losses[1].policy - losses[0].policy, 0.25 * kl / D)
    assert losses[1].metrics["kl"].tolist() == pytest.approx([kl.item()] * 5)


def test_without_the_penalty_it_is_ddpo(toys: Any, draw: Any):
    policy = toys.OneStep(draw(D), draw(D), 0.6)
    rollout = policy.rollout(draw(50, 1, 1, D), draw(D))
    policy.mean = policy.mean + 0.01  # off the behaviour policy
    losses = []
    for cls, extra in ((Ddpo, {}), (Dpok, {"beta": 0.0})):
        algorithm, batch = prepared(cls(cls.Config(clip_range=1e-3, **extra)), rollout)
        losses.append(algorithm.loss(policy, batch).policy)
    assert torch.equal(*losses)


def test_it_pulls_to_the_kl_regularised_optimum_of_a_linear_reward(toys: Any, draw: Any):
    """Of E[A] - beta KL with A = (c . x - mean) / std_r on N(m, s^2 I): m* = m_ref + s^2 c / (beta std_r), any D.

    There the gradient's mean is zero: its estimate is one of n terms A z / (s D), of standard error at most about
    sqrt(3) / (s D sqrt(n)) per dimension, and five of these are allowed. At the reference it points to m*.
    """
    n, s, beta = 200_000, 0.6, 0.5
    gain, reference, noise = draw(D), draw(D), draw(n, 1, 1, D)
    spread = s * gain.norm()  # std of the reward
    optimum = reference + s**2 * gain / (beta * spread)
    tolerance = 5 * 3**0.5 / (s * D * n**0.5)

    def gradient(at: torch.Tensor) -> torch.Tensor:
        policy = toys.OneStep(at.clone().requires_grad_(), reference, s)
        config = Dpok.Config(beta=beta, advantage_clip=1e9, clip_range=0.5)
        algorithm, batch = prepared(Dpok(config), policy.rollout(noise, gain))
        return torch.autograd.grad(algorithm.loss(policy, batch).policy.mean(), policy.mean)[0]

    assert gradient(optimum).abs().max() < tolerance
    start = gradient(reference)
    assert start.abs().max() > 10 * tolerance
    assert torch.nn.functional.cosine_similarity(-start, optimum - reference, dim=0) > 0.999
    beyond = gradient(reference + 2 * (optimum - reference))
    assert torch.dot(beyond, optimum - reference) > 0
