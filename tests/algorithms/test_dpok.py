from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small import minibatch_loss

from flowbench.algorithms.dpok import Dpok
from flowbench.rollout import Rollout
from flowbench.toolkit.critic import explained_variance
from flowbench.toolkit.value import StepValue

D = 3


def loss_of(policy: Any, rollout: Any, **config: Any) -> Any:
    algorithm = Dpok(Dpok.Config(**config))
    algorithm.setup(policy)
    return minibatch_loss(algorithm, policy, algorithm.prepare(rollout))


def test_its_penalty_is_the_exact_kl_of_torchs_normals(toys: Any, draw: Any):
    """Summed over dimensions and divided by their number, as the log-ratio is."""
    mean, reference, std = draw(D), draw(D), 0.6
    policy = toys.OneStep(mean, reference, std)
    rollout = policy.rollout(draw(5, 1, 1, D), draw(D))
    losses = [loss_of(policy, rollout, beta=beta, value=False) for beta in (0.0, 0.25)]
    p, q = (torch.distributions.Normal(m, std) for m in (mean, reference))
    kl = torch.distributions.kl_divergence(p, q).sum()
    assert torch.allclose(losses[1].policy - losses[0].policy, 0.25 * kl / D)
    assert losses[1].metrics["kl"].tolist() == pytest.approx([kl.item()] * 5)


@pytest.mark.parametrize("reward", [2.0, -2.0])
@pytest.mark.parametrize("moved", [1e-3, 0.1, -1e-3, -0.1])
def test_a_ratio_outside_the_range_stops_the_gradient_whatever_the_advantage(toys: Any, reward: float, moved: float):
    """PPO's form, DDPO's and Flow-GRPO's, lets rows come back from the wrong side."""
    start = torch.zeros(D, dtype=torch.float64)
    policy = toys.OneStep(start, start, 0.6)
    rollout = policy.rollout(torch.full((2, 1, 1, D), 0.5, dtype=torch.float64), start)
    rollout = replace(rollout, reward=torch.tensor([reward, 0.0]))
    policy.mean = (start + moved).requires_grad_()
    loss = loss_of(policy, rollout, beta=0.0, clip_range=0.01, value=False).policy
    (gradient,) = torch.autograd.grad(loss[0], policy.mean)
    assert (gradient.abs().max() > 0) == (abs(moved) < 0.01)


def test_its_value_learns_what_state_text_and_step_say_of_the_reward():
    """Half of the reward is the text's, a fourth the state's, and that fourth changes sign with the step."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    value = StepValue((1, 2, 2), 2, steps=2)
    optimizer = torch.optim.AdamW(value.parameters(), lr=1e-3)

    def batch(n: int) -> tuple[torch.Tensor, ...]:
        x, text = torch.randn(n, 1, 2, 2, generator=generator), torch.randint(2, (n,), generator=generator)
        step = torch.randint(2, (n,), generator=generator)
        target = 2.0 * text - 1 + (1 - 2 * step) * x.sum((1, 2, 3)) / 8**0.5
        return x, torch.nn.functional.one_hot(text, 2).float(), step, target

    assert value(*batch(8)[:3]).abs().max() == 0  # untrained, it leaves the reward as it is
    for _ in range(300):
        *seen, target = batch(128)
        optimizer.zero_grad()
        (value(*seen) - target).square().mean().backward()
        optimizer.step()
    *seen, target = batch(1000)
    with torch.no_grad():
        assert explained_variance(value(*seen), target) > 0.95


def test_large_latents_are_averaged_for_the_value():
    value = StepValue((2, 128, 96), 3, steps=4)
    x, text, step = torch.randn(2, 2, 128, 96), torch.randn(2, 3), torch.tensor([0, 3])
    torch.nn.init.ones_(value.last.weight)
    assert value.cells == (64, 64)
    assert value(x, text, step).shape == (2,)


def test_its_value_sees_the_state_that_a_step_began_with_its_text_and_the_steps_number(make_policy: Any):
    """And the advantage is the standardised reward minus that value, bounded."""
    policy = make_policy(sampler="flow-sde", eta=0.7)
    prompts = ("a red circle", "a red circle", "two crosses")
    cond = policy.encode(prompts)
    s = policy.rollout(cond, policy.draw_noise(3), sampler=policy.sampler, keep_states=True)
    reward = torch.tensor([0.0, 3.0, 6.0])
    rollout = Rollout(0, prompts, torch.tensor([0, 0, 1]), cond, s.sigmas, s.x0, s.x0, reward, s.states, s.log_prob)
    algorithm = Dpok(Dpok.Config(advantage_clip=1.2))
    algorithm.setup(policy)
    seen: list[tuple[torch.Tensor, ...]] = []
    algorithm.critic.forward = lambda *inputs: (seen.append(inputs), inputs[2] / 4)[1]
    batch = algorithm.prepare(rollout)
    scalars = algorithm.compare(algorithm.measure(policy, batch)).scalars
    x, summary, step = seen[0]
    assert torch.equal(x, s.states[:, :4].flatten(0, 1))
    assert torch.equal(summary, policy.text_summary(cond)[torch.arange(3).repeat_interleave(4)])
    assert step.tolist() == [0, 1, 2, 3] * 3
    expected = [max(-1.2, shaped - k / 4) for shaped in (-1, 0, 1) for k in range(4)]
    assert scalars["advantage"].tolist() == pytest.approx(expected, abs=1e-5)


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
        config = {"beta": beta, "advantage_clip": 1e9, "clip_range": 0.5, "value": False}
        loss = loss_of(policy, policy.rollout(noise, gain), **config).policy.mean()
        return torch.autograd.grad(loss, policy.mean)[0]

    assert gradient(optimum).abs().max() < tolerance
    start = gradient(reference)
    assert start.abs().max() > 10 * tolerance
    assert torch.nn.functional.cosine_similarity(-start, optimum - reference, dim=0) > 0.999
    beyond = gradient(reference + 2 * (optimum - reference))
    assert torch.dot(beyond, optimum - reference) > 0
