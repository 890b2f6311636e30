from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowbench.algorithms.refl import Refl
from flowbench.evaluation.judges import build_reward
from flowbench.models.policy import Policy
from flowbench.models.presets import ModelPreset
from flowbench.reward import checked_score
from flowbench.rollout import Batch, Conditioning, Rollout


def batch_of(x: torch.Tensor, sigma: torch.Tensor, prompts: tuple[str, ...], cond: Conditioning) -> Batch:
    return Batch(prompts, cond, x, torch.zeros(len(x)), x=x, sigma=sigma)


def test_its_gradient_equals_finite_differences_in_a_scalar_parameter():
    """v = tanh(theta x), decode squares, r = mean: every part is nonlinear and smooth."""
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)
    gain = {"current": theta, "reference": 0.5}
    policy: Any = SimpleNamespace(
        guided_velocity=lambda x, sigma, cond, weights="current": torch.tanh(gain[weights] * x),
        decode=lambda latents: latents.square(),
    )
    cond = Conditioning({}, torch.zeros(3, dtype=torch.int64))
    batch = batch_of(x, sigma, ("p",) * 3, cond)
    algorithm = Refl(Refl.Config(scale=0.5, margin=2.0, alpha=0.3), lambda images, prompts: images.mean((1, 2, 3)))

    def loss(value: float) -> torch.Tensor:
        theta.data.fill_(value)
        return algorithm.loss(policy, batch).policy.sum()

    (gradient,) = torch.autograd.grad(loss(0.7), theta)
    h = 1e-5
    assert gradient.item() == pytest.approx(((loss(0.7 + h) - loss(0.7 - h)) / (2 * h)).item(), rel=1e-7)
    assert abs(gradient.item()) > 1e-3


def test_its_gradient_through_decoder_and_clip_equals_finite_differences(
    make_policy: Callable[..., Policy], preset: ModelPreset
):
    policy, reward = make_policy(), build_reward("clip", preset, torch.device("cpu"))
    algorithm = Refl(Refl.Config(scale=1.0, margin=2.0, alpha=0.0), lambda i, p: checked_score(reward, i, p))
    algorithm.setup(policy)
    prompts = ("a red circle", "two crosses", "a small square", "a blue triangle")
    policy.generator = torch.Generator().manual_seed(0)
    cond = policy.encode(prompts)
    samples = policy.rollout(cond, policy.draw_noise(4), keep_states=True)
    batch = batch_of(samples.states[:, 3], samples.sigmas[3].expand(4), prompts, cond)
    parameters = [p for p in policy.trainable_parameters() if p.requires_grad]
    gradient = torch.autograd.grad(algorithm.loss(policy, batch).policy.mean(), parameters, allow_unused=True)
    pairs = [(p, g) for p, g in zip(parameters, gradient, strict=True) if g is not None]
    norm = torch.cat([g.flatten() for _, g in pairs]).norm().item()
    assert norm > 0

    def loss(distance: float) -> float:
        with torch.no_grad():
            for p, g in pairs:
                p += distance / norm * g
            value = algorithm.loss(policy, batch).policy.mean().item()
            for p, g in pairs:
                p -= distance / norm * g
        return value

    h = 3e-2  # rewards near 1 in float32: rounding would be 5 % of the difference at a tenth of it
    assert (loss(h) - loss(-h)) / (2 * h) == pytest.approx(norm, rel=0.03)


def test_rewards_above_the_margin_have_no_gradient():
    theta = torch.tensor(1.0, requires_grad=True)
    policy: Any = SimpleNamespace(guided_velocity=lambda x, sigma, cond: theta * x, decode=lambda latents: latents)
    x = torch.tensor([1.0, 9.0]).view(2, 1, 1, 1)
    cond = Conditioning({}, torch.zeros(2, dtype=torch.int64))
    algorithm = Refl(Refl.Config(scale=1.0, margin=2.0, alpha=0.0), lambda images, prompts: images.mean((1, 2, 3)))
    loss = algorithm.loss(policy, batch_of(x, torch.tensor([0.5, 0.5]), ("p", "p"), cond)).policy
    gradients = [torch.autograd.grad(value, theta, retain_graph=True)[0].item() for value in loss]
    assert loss.tolist() == [1.5, 0.0]  # x0_hat = x - 0.5 x
    assert gradients == [0.5, 0.0]


@pytest.mark.parametrize(("late", "steps"), [(0.25, {6, 7}), (0.5, {4, 5, 6, 7}), (1.0, set(range(8)))])
def test_states_come_from_the_last_share_of_the_steps(shared_policy: Policy, late: float, steps: set[int]):
    n, prompts = 200, ("a circle",) * 200
    sigmas = torch.linspace(1, 0, 9)
    states = torch.arange(9.0).view(1, 9, 1, 1, 1).expand(n, 9, 1, 1, 1)
    x0, zeros = states[:, -1], torch.zeros(n)
    rollout = Rollout(0, prompts, torch.zeros(n).long(), shared_policy.encode(prompts), sigmas, x0, x0, zeros, states)
    algorithm = Refl(Refl.Config(late=late))
    algorithm.setup(shared_policy)
    x, sigma = algorithm.prepare(rollout).state()
    assert set(x.flatten().int().tolist()) == steps
    assert torch.equal(sigma, sigmas[x.flatten().int()])
