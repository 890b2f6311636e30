from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small import minibatch_loss

from flowbench.algorithms.draft import Draft
from flowbench.config import resolve_config
from flowbench.errors import UsageError
from flowbench.models.flow import SAMPLERS, Step, ode_step
from flowbench.models.policy import Policy

STEPS = 4


class Sine:
    """v = sin(theta x) sampled by Euler steps; decode squares: every part is nonlinear and smooth."""

    sampler, num_steps = SAMPLERS["ode"], STEPS
    denoise = Policy.denoise

    def __init__(self, theta: float) -> None:
        self.theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        self.generator = torch.Generator().manual_seed(3)

    def transition(self, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, cond: object) -> Step:
        return ode_step(x, torch.sin(self.theta * x), sigma, sigma_next, 0.0)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.square()

    def draw_noise(self, n: int, device: torch.device | None = None) -> torch.Tensor:
        return torch.randn(n, 1, 2, 2, generator=self.generator, dtype=torch.float64)


def score(images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
    return torch.tanh(images).sum((1, 2, 3))


def path(theta: float, noise: torch.Tensor, toys: Any) -> Any:
    """The rollout of `Sine(theta)` from this noise."""
    policy, sigmas, states = Sine(theta), torch.linspace(1, 0, STEPS + 1, dtype=torch.float64), [noise]
    with torch.no_grad():
        for k in range(STEPS):
            states.append(policy.denoise(states[-1], sigmas[k : k + 2], None, noise[:, None]))
        reward = score(policy.decode(states[-1]), ())
    return toys.make_rollout(states[-1], reward, sigmas=sigmas, states=torch.stack(states, 1))


def loss_of(policy: Sine, rollout: Any, **config: int) -> torch.Tensor:
    algorithm = Draft(Draft.Config(**config), score)
    algorithm.setup(policy)
    return minibatch_loss(algorithm, policy, algorithm.prepare(rollout)).policy


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_its_gradient_equals_finite_differences_through_the_last_steps(toys: Any, draw: Any, steps: int):
    """With the state K steps before the end held fixed, as the truncation does."""
    rollout = path(0.7, draw(3, 1, 2, 2), toys)
    policy = Sine(0.7)
    (gradient,) = torch.autograd.grad(loss_of(policy, rollout, steps=steps).sum(), policy.theta)
    h = 1e-5
    up, down = (loss_of(Sine(0.7 + d), rollout, steps=steps).sum().item() for d in (h, -h))
    assert gradient.item() == pytest.approx((up - down) / (2 * h), rel=1e-7)
    assert abs(gradient.item()) > 1e-3


def test_through_all_steps_its_gradient_is_that_of_the_samplers_reward(toys: Any, draw: Any):
    """Here finite differences sample anew from the same noise."""
    noise, h = draw(3, 1, 2, 2), 1e-5
    policy = Sine(0.7)
    (gradient,) = torch.autograd.grad(loss_of(policy, path(0.7, noise, toys), steps=STEPS).sum(), policy.theta)
    up, down = (path(0.7 + d, noise, toys).reward.sum().item() for d in (h, -h))
    assert -gradient.item() == pytest.approx((up - down) / (2 * h), rel=1e-7)


@pytest.mark.parametrize("steps", [1, 3])
def test_with_unchanged_weights_it_reproduces_the_rewards_of_the_rollout(toys: Any, draw: Any, steps: int):
    rollout = path(0.7, draw(3, 1, 2, 2), toys)
    assert torch.allclose(-loss_of(Sine(0.7), rollout, steps=steps), rollout.reward)


def test_the_low_variance_form_averages_one_step_rewards_over_draws_of_noise(toys: Any, draw: Any):
    """x_1 = (1 - sigma_1) x0 + sigma_1 eps, then one step to sigma = 0: x_1 - sigma_1 v(x_1)."""
    rollout, policy, sigma = path(0.7, draw(3, 1, 2, 2), toys), Sine(0.7), 1 / STEPS
    loss = loss_of(policy, rollout, noises=2)
    assert loss.shape == (6,)
    (gradient,) = torch.autograd.grad(loss.mean(), policy.theta)

    eps = Sine(0.7).draw_noise(6)
    x = (1 - sigma) * rollout.x0.repeat(2, 1, 1, 1) + sigma * eps
    expected = -score((x - sigma * torch.sin(policy.theta * x)).square(), ()).view(2, 3).mean(0)
    assert torch.allclose(loss.view(2, 3).mean(0), expected)
    assert gradient.item() == pytest.approx(torch.autograd.grad(expected.mean(), policy.theta)[0].item())


def test_the_low_variance_form_needs_no_states_and_only_one_step():
    assert Draft(Draft.Config(noises=2)).needs() == {"reward_grad"}
    assert Draft(Draft.Config(steps=2)).needs() == {"states", "reward_grad"}
    with pytest.raises(ValidationError, match="DRaFT-LV has one step"):
        Draft.Config(steps=2, noises=2)
    overrides = {"algorithm.steps": 2, "algorithm.noises": 2}
    with pytest.raises(UsageError, match=r"setting 'algorithm\.noises' = 2: .*draft-lv has one step") as raised:
        resolve_config("draft", "clip", "mini-sd3", overrides=overrides)
    assert len(str(raised.value).splitlines()) == 1


def test_more_steps_than_the_sampler_has_are_refused():
    with pytest.raises(UsageError, match=r"algorithm\.steps is 5, but the sampler takes 4 steps"):
        Draft(Draft.Config(steps=5)).setup(SimpleNamespace(num_steps=STEPS))
