"""Algorithms on the Gaussian, where theory says what they must do.

The algorithms' own objectives are pinned down in tests/algorithms; here they meet the model, its samplers and rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import minibatch_loss

from flowbench.algorithm import no_score
from flowbench.algorithms.ddpo import Ddpo
from flowbench.algorithms.orw_cfm_w2 import OrwCfmW2
from flowbench.algorithms.refl import Refl
from flowbench.evaluation.exact import sampled_gaussian
from flowbench.models.families.plane import exact_field
from flowbench.models.flow import SAMPLERS, interpolate, predict_x0
from flowbench.models.policy import Policy
from flowbench.reward import Reward
from flowbench.rollout import Batch, Rollout
from flowbench.testbeds.plane.density import Gaussian, QuadraticForm
from flowbench.toolkit.critic import Sight, explained_variance
from flowbench.training.trainer import Trainer

MakePolicy = Callable[..., Policy]
Form = Callable[..., QuadraticForm]


def rows(policy: Policy, x0: torch.Tensor, reward: torch.Tensor) -> Batch:
    n = len(x0)
    return Batch(("p",) * n, policy.encode(["p"] * n), x0.reshape(n, 2, 1, 1), reward)


def flat(parts: Any) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def minimize_quadratic(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> None:
    """One Newton step, which reaches the minimum of a loss that is quadratic in the parameters."""
    slope = flat(torch.autograd.grad(loss, parameters, create_graph=True))
    hessian = torch.stack([flat(torch.autograd.grad(s, parameters, retain_graph=True)) for s in slope])
    step = torch.linalg.solve(hessian, slope.detach())
    for p, part in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
        p.data -= part.view_as(p)


# --- ORW-CFM-W2 -----------------------------------------------------------------------------------------------------

CHAINS, IMAGES, STEPS = 4, 10_000, 500


def outer_iterations(policy: Policy, reward: QuadraticForm, tau: float, count: int, seed: int) -> Gaussian:
    """The distribution after `count` rounds, each of which samples from the flow and solves ORW's regression."""
    policy.generator = torch.Generator().manual_seed(seed)
    algorithm = OrwCfmW2(OrwCfmW2.Config(tau=tau, alpha=0.0))
    algorithm.setup(policy)
    sigmas = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    for _ in range(count):
        x0 = sampled_gaussian(exact_field(policy), sigmas).sample(IMAGES, policy.generator)
        loss = minibatch_loss(algorithm, policy, rows(policy, x0, reward(x0))).policy
        minimize_quadratic(loss.mean(), policy.trainable_parameters())
    return sampled_gaussian(exact_field(policy), sigmas)


@pytest.mark.parametrize(("name", "tau"), [("linear", 0.5), ("quadratic", 1.0)])
def test_orw_without_regularisation_multiplies_the_density_by_the_weight_in_every_round(
    make_analytic_policy: MakePolicy, form: Form, name: str, tau: float
):
    """q_N is proportional to w^N q_0 (2502.06061, theorem 3): a linear reward moves the mean by N tau S c and leaves
    the covariance; a quadratic one narrows it to (S^-1 + N tau Q)^-1.

    Tolerance: 4 standard errors over independent chains, and 1 % for the sampler's remaining error: 0.6 % of the
    covariance at 500 steps, in each of the rounds.
    """
    rounds, reward = 2, form(name)
    policies = [make_analytic_policy(dtype=torch.float64, sigma_distribution="uniform") for _ in range(CHAINS)]
    ends = [outer_iterations(p, reward, tau, rounds, seed) for seed, p in enumerate(policies)]
    start = policies[0].transformer.density
    assert isinstance(start, Gaussian)
    theory, before = start.tilt(reward, 1 / (rounds * tau)), start.tilt(reward, 1 / ((rounds - 1) * tau))
    for quantity in ("mean", "covariance"):
        values = torch.stack([getattr(end, quantity) for end in ends])
        expected = getattr(theory, quantity)
        tolerance = 4 * values.std(0) / math.sqrt(CHAINS) + 0.01 * expected.norm()
        assert ((values.mean(0) - expected).abs() < tolerance).all()
        if quantity == "mean" or name == "quadratic":  # the round before is told apart
            assert ((values.mean(0) - getattr(before, quantity)).abs() > tolerance).any()


@pytest.mark.parametrize("name", ["linear", "quadratic"])
def test_orws_gradient_vanishes_at_the_exact_pointwise_minimiser(
    make_analytic_policy: MakePolicy, form: Form, name: str
):
    """v* = (E[w u | x] + alpha v_ref) / (E[w | x] + alpha), both expectations in closed form.

    Given x_sigma = x, x0 is Gaussian, so that E[w | x] is its partition; and E[w u | x] = E[w | x] v of the tilted
    density. The mean gradient over 200,000 rows is within 4 of its standard errors of 0.
    """
    n, tau, alpha, s, reward = 200_000, 1.5, 1.0, 0.6, form(name)
    policy, x = make_analytic_policy(dtype=torch.float64), torch.tensor([[0.8, -0.4]], dtype=torch.float64)
    density, sigma = policy.transformer.density, torch.full((1,), s, dtype=torch.float64)
    assert isinstance(density, Gaussian)
    gain = (1 - s) * density.covariance @ torch.linalg.inv((1 - s) ** 2 * density.covariance + s**2 * torch.eye(2))
    mean = density.mean + gain @ (x[0] - (1 - s) * density.mean)
    posterior = Gaussian(mean, density.covariance - (1 - s) * gain @ density.covariance)
    weight = posterior.log_partition(reward, torch.tensor(tau).double()).exp()
    v_ref, v_tilted = density.velocity(x, sigma), density.tilt(reward, 1 / tau).velocity(x, sigma)
    best = (weight * v_tilted + alpha * v_ref) / (weight + alpha)
    assert (best - v_ref).norm() > 0.1

    x0 = posterior.sample(n, torch.Generator().manual_seed(0))
    u = ((x - (1 - s) * x0) / s - x0)[:, :, None, None]
    noise = (u + x0[:, :, None, None])[:, None]  # which takes each image to x
    algorithm = OrwCfmW2(OrwCfmW2.Config(tau=tau, alpha=alpha))
    algorithm.setup(policy)
    shift, batch = policy.transformer.correction.shift, rows(policy, x0, reward(x0))
    batch = replace(batch, noise=noise, noise_sigma=sigma.expand(n))

    def gradient(v: torch.Tensor) -> torch.Tensor:
        shift.data[0] = (v - v_ref)[0]  # of the constant polynomial: the velocity itself
        return torch.autograd.grad(minibatch_loss(algorithm, policy, batch).policy.mean(), shift)[0][0]

    error = (reward(x0).mul(tau).exp()[:, None] * (best - u.flatten(1))).std(0) / math.sqrt(n)
    assert (gradient(best).abs() < 4 * error).all()
    assert (gradient(v_ref).norm() > 20 * error.norm()).item()


# --- AC-Flow's critic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("critic", "model", "states"),
    [
        ("direct", "gaussian", "renoised"),
        ("direct", "gaussian", "trajectory"),
        ("sees", "gaussian", "renoised"),
        ("sees", "gaussian", "trajectory"),
        ("sees", "mixture", "renoised"),
    ],
)
def test_acflows_critic_explains_as_much_of_the_reward_as_any_function_of_the_state_can(
    make_analytic_trainer: Callable[..., Trainer], form: Form, critic: str, model: str, states: str
):
    """V* = E[r | x_sigma] = c . E[x0 | x_sigma] for re-noised states, and r itself on the deterministic trajectory.

    Explained variance within 2 % of that of V*, on 8,000 fresh states. The mixture is sampled in 40 steps, so that its
    exact velocity says what E[x0 | x_sigma] is.
    """
    steps = 10 if model == "gaussian" else 40
    trainer = make_analytic_trainer(
        "acflow",
        model=model,
        training__images=25_600,
        training__images_per_prompt=64,
        training__minibatch=1024,
        training__num_steps=steps,
        training__auxiliary_steps=8,
        training__auxiliary_learning_rate=2e-3,
        training__sigma_distribution="uniform",
        algorithm__states=states,
        algorithm__critic=critic,
        algorithm__shaping="none",
        training__shared_noise=False,
    )
    trainer.algorithm.cfg = trainer.algorithm.cfg.model_copy(update={"warmup": 10_000})  # the policy stays
    trainer.run()
    policy, reward, n = trainer.policy, form("linear", model), 8000
    policy.generator = torch.Generator().manual_seed(1)
    cond = policy.encode(["p"] * n)
    samples = policy.rollout(cond, policy.draw_noise(n), num_steps=steps, keep_states=True)
    r = reward(samples.x0.flatten(1))
    if states == "renoised":
        sigma = policy.draw_sigmas(n)
        x = interpolate(samples.x0, policy.draw_noise(n), sigma)
        field = exact_field(policy)
        if model == "gaussian":
            v = sampled_gaussian(field, samples.sigmas.double()).velocity(x.flatten(1), sigma)
        else:
            v = field(x.flatten(1).double(), sigma.double())
        best = reward(predict_x0(x.flatten(1), v, sigma))
    else:
        step = policy.draw_integers(steps, n)
        x, sigma, best = samples.states[torch.arange(n), step], samples.sigmas[step], r
    rows = Sight(x, sigma, cond, ("p",) * n, r, torch.arange(n))
    with torch.no_grad():
        value = trainer.algorithm.critics["value"].measure(policy, rows, no_score)
    possible = explained_variance(best, r).item()
    assert possible == pytest.approx(1.0) if states == "trajectory" else 0.3 < possible < 0.7
    assert explained_variance(value, r).item() > 0.98 * possible


# --- gradients ------------------------------------------------------------------------------------------------------


def disturbed(policy: Policy) -> Policy:
    """With small random weights, so that no gradient is 0 by symmetry."""
    generator = torch.Generator().manual_seed(3)
    for p in policy.trainable_parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return policy


def finite_differences(function: Callable[[], float], parameters: list[torch.nn.Parameter], h: float) -> torch.Tensor:
    """Central differences of a function of the parameters, one by one."""
    slopes = []
    for p in parameters:
        for k in range(p.numel()):
            value = p.data.view(-1)[k].item()
            ends = []
            for shifted in (value + h, value - h):
                p.data.view(-1)[k] = shifted
                ends.append(function())
            p.data.view(-1)[k] = value
            slopes.append((ends[0] - ends[1]) / (2 * h))
    return torch.tensor(slopes, dtype=torch.float64)


def test_ddpos_gradient_at_ratio_one_is_that_of_the_stochastic_samplers_expected_reward(
    make_analytic_policy: MakePolicy, form: Form
):
    """Against finite differences in all 36 weights, with common noise; within 4.5 standard errors in each of them.

    The batch's mean over transitions, the normalisation by the rewards' deviation and the ratio of mean log-probs over
    two dimensions are undone by the factor -steps x deviation x 2.
    """
    policy, reward, n, steps = (
        disturbed(make_analytic_policy(dtype=torch.float64, sampler="flow-sde")),
        form("linear"),
        4000,
        6,
    )
    parameters, cond = policy.trainable_parameters(), policy.encode(["p"] * n)
    algorithm = Ddpo(Ddpo.Config(clip_range=0.5, advantage_clip=1e9, buffer_size=n))
    algorithm.setup(policy)

    def sample(seed: int) -> Rollout:
        policy.generator = torch.Generator().manual_seed(seed)
        noise = policy.draw_noise(n).double()
        s = policy.rollout(cond, noise, sampler=SAMPLERS["flow-sde"], num_steps=steps, keep_states=True)
        group = torch.zeros(n, dtype=torch.int64)
        r = reward(s.x0.flatten(1))
        return Rollout(0, ("p",) * n, group, cond, s.sigmas, s.x0, s.x0, r, s.states, s.log_prob)

    estimates = []
    for seed in range(16):
        rollout = sample(seed)
        loss = minibatch_loss(algorithm, policy, algorithm.prepare(rollout)).policy.mean()
        scale = -steps * rollout.reward.std(correction=0).item() * 2
        estimates.append(scale * flat(torch.autograd.grad(loss, parameters)))
    stacked = torch.stack(estimates)
    error = stacked.std(0) / math.sqrt(len(stacked))
    exact = finite_differences(lambda: sample(0).reward.mean().item(), parameters, 1e-4)
    # An affine field and a linear reward: the reward's slope hardly depends on the noise, which the differences share.
    assert (stacked.mean(0) - exact).norm() < 0.1 * exact.norm()
    assert ((stacked.mean(0) - exact).abs() < 4.5 * error + 0.01 * exact.norm()).all()


def test_refls_gradient_is_that_of_finite_differences_in_all_weights(
    make_analytic_policy: MakePolicy, point_reward: Callable[..., Reward]
):
    policy, scorer = disturbed(make_analytic_policy(dtype=torch.float64)), point_reward("quadratic")
    algorithm = Refl(Refl.Config(scale=1.0, margin=2.0, late=0.5, alpha=0.3), scorer.score)
    algorithm.setup(policy)
    policy.generator = torch.Generator().manual_seed(0)
    cond = policy.encode(["p"] * 8)
    s = policy.rollout(cond, policy.draw_noise(8).double(), num_steps=6, keep_states=True)
    rollout = Rollout(0, ("p",) * 8, torch.zeros(8).long(), cond, s.sigmas, s.x0, s.x0, torch.zeros(8), s.states)
    batch, parameters = algorithm.prepare(rollout), policy.trainable_parameters()
    gradient = flat(torch.autograd.grad(minibatch_loss(algorithm, policy, batch).policy.mean(), parameters))
    exact = finite_differences(lambda: minibatch_loss(algorithm, policy, batch).policy.mean().item(), parameters, 1e-5)
    assert exact.norm() > 0.1
    assert torch.allclose(gradient, exact, atol=1e-8)
