"""The Gaussian closed form: data N(0, S) has v(x, sigma) = (sigma - (1 - sigma) S) / S_sigma x, which is linear, so
that a sampler's variance can be propagated exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from flowbench.errors import UsageError
from flowbench.models.flow import (
    SAMPLERS,
    Step,
    cps_step,
    dance_sde_step,
    expand,
    flow_sde_step,
    gaussian_kl,
    gaussian_log_prob,
    get_sampler,
    interpolate,
    ode_step,
    predict_x0,
    velocity_error,
)

DATA_VARIANCE = 0.34
StepFunction = Callable[..., Step]


def path_variance(sigma: float, s: float) -> float:
    """S_sigma: the variance of x_sigma when x0 has variance s."""
    return (1 - sigma) ** 2 * s + sigma**2


def velocity_gain(sigma: float, s: float) -> float:
    return (sigma - (1 - sigma) * s) / path_variance(sigma, s)


def grid(steps: int) -> list[float]:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


def sampled_variance(step: StepFunction, steps: int, eta: float = 0.7, s: float = DATA_VARIANCE) -> float:
    """The exact variance of a sampler's endpoint: each step maps the variance q to gain^2 q + std^2."""
    one, variance = torch.ones(1, 1, dtype=torch.float64), 1.0
    for sigma, sigma_next in pairwise(grid(steps)):
        result = step(one, one * velocity_gain(sigma, s), sigma, sigma_next, eta)
        variance = result.mean.item() ** 2 * variance + float(result.std) ** 2
    return variance


def test_the_closed_form_velocity_is_the_regression_of_the_target_velocity():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    x0 *= DATA_VARIANCE**0.5
    for sigma in (0.2, 0.5, 0.9):
        x = interpolate(x0, eps, sigma)
        slope = (x * (eps - x0)).mean() / x.square().mean()
        assert slope.item() == pytest.approx(velocity_gain(sigma, DATA_VARIANCE), abs=0.01)


def test_interpolation_joins_image_and_noise():
    x0, eps = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    assert torch.equal(interpolate(x0, eps, 0.0), x0)
    assert torch.equal(interpolate(x0, eps, 1.0), eps)
    assert torch.allclose(interpolate(x0, eps, 0.25), 0.75 * x0 + 0.25 * eps)


def test_interpolation_takes_one_sigma_per_row():
    x0, eps, sigma = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.3, 1.0])
    rows = [interpolate(x0[i : i + 1], eps[i : i + 1], s) for i, s in enumerate(sigma.tolist())]
    assert torch.allclose(interpolate(x0, eps, sigma), torch.cat(rows))


def test_the_true_velocity_predicts_the_image():
    x0, eps = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    sigma = torch.rand(5, dtype=torch.float64)
    assert torch.allclose(predict_x0(interpolate(x0, eps, sigma), eps - x0, sigma), x0)


def test_the_target_velocity_is_the_derivative_of_the_path():
    x0, eps = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    slope = (interpolate(x0, eps, 0.5 + 1e-5) - interpolate(x0, eps, 0.5 - 1e-5)) / 2e-5
    assert torch.allclose(slope, eps - x0, atol=1e-8)


def test_velocity_error_is_the_mean_square_over_latent_dimensions():
    v, u = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    u[1] = 0
    u[1, 0, 0, 0] = 6.0
    assert velocity_error(v, u).tolist() == [1.0, pytest.approx(36 / 48)]


def test_expand_broadcasts_over_latent_dimensions():
    like = torch.zeros(3, 4, 8, 8)
    assert expand(torch.rand(3), like).shape == (3, 1, 1, 1)
    assert expand(0.5, like).shape == ()


def test_ode_euler_converges_with_order_one():
    """Along one trajectory of the Gaussian's flow, x(0) = sqrt(S) x(1) exactly."""

    def error(steps: int) -> float:
        x = torch.ones(1, 1, dtype=torch.float64)
        for sigma, sigma_next in pairwise(grid(steps)):
            x = ode_step(x, x * velocity_gain(sigma, DATA_VARIANCE), sigma, sigma_next, 0.0).mean
        return abs(x.item() - DATA_VARIANCE**0.5)

    errors = [error(steps) for steps in (100, 200, 400)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([1.0, 1.0], abs=0.05)


def test_one_euler_step_is_exact_for_a_straight_path():
    x0, eps = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    step = ode_step(eps, eps - x0, 1.0, 0.0, 0.7)
    assert torch.allclose(step.mean, x0)
    assert float(step.std) == 0.0


@pytest.mark.parametrize(("steps", "variance"), [(10, 0.316), (40, 0.338), (400, 0.342)])
def test_flow_sde_has_the_published_variance_of_a_gaussian(steps: int, variance: float):
    assert sampled_variance(flow_sde_step, steps) == pytest.approx(variance, abs=1.1e-3)


def test_ode_euler_has_the_published_variance_of_a_gaussian():
    assert sampled_variance(ode_step, 10) == pytest.approx(0.257, abs=6e-4)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_flow_sde_keeps_the_marginal_variance_of_a_gaussian(eta: float):
    assert sampled_variance(flow_sde_step, 4000, eta) == pytest.approx(DATA_VARIANCE, rel=0.004)


def test_flow_sde_keeps_every_intermediate_marginal():
    """A small step from the exact marginal at sigma leads to that at the next sigma, to second order."""
    for sigma in (0.9, 0.6, 0.3):
        errors = []
        for d in (1e-2, 1e-3):
            one = torch.ones(1, 1, dtype=torch.float64)
            step = flow_sde_step(one, one * velocity_gain(sigma, DATA_VARIANCE), sigma, sigma - d, 0.7)
            reached = step.mean.item() ** 2 * path_variance(sigma, DATA_VARIANCE) + float(step.std) ** 2
            errors.append(abs(reached - path_variance(sigma - d, DATA_VARIANCE)))
        assert math.log10(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.1)


def test_dance_sde_keeps_every_intermediate_marginal():
    for sigma in (0.9, 0.6, 0.3):
        errors = []
        for d in (1e-2, 1e-3):
            one = torch.ones(1, 1, dtype=torch.float64)
            step = dance_sde_step(one, one * velocity_gain(sigma, DATA_VARIANCE), sigma, sigma - d, 0.3)
            reached = step.mean.item() ** 2 * path_variance(sigma, DATA_VARIANCE) + float(step.std) ** 2
            errors.append(abs(reached - path_variance(sigma - d, DATA_VARIANCE)))
        assert math.log10(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.1)


def test_cps_loses_variance_however_many_steps_it_takes():
    assert sampled_variance(cps_step, 400, s=0.300) == pytest.approx(0.216, abs=2e-3)
    assert sampled_variance(cps_step, 4000, s=0.300) == pytest.approx(0.216, abs=2e-3)


def test_cps_carries_the_noise_level_of_its_sigma():
    """The coefficients of x1_hat and of fresh noise add up, in squares, to the next sigma's."""
    x, v = torch.randn(2, 1, 4, dtype=torch.float64)
    step = cps_step(x, v, 0.6, 0.4, 0.7)
    x0_hat, x1_hat = x - 0.6 * v, x + 0.4 * v
    coefficient = ((step.mean - 0.6 * x0_hat) / x1_hat).mean().item()
    assert coefficient**2 + float(step.std) ** 2 == pytest.approx(0.4**2)


@pytest.mark.parametrize("name", ["flow-sde", "cps"])
def test_a_stochastic_sampler_without_noise_is_the_ode(name: str):
    x, v = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    for sigma, sigma_next in ((1.0, 0.9), (0.5, 0.4), (0.1, 0.0)):
        step = SAMPLERS[name].step(x, v, sigma, sigma_next, 0.0)
        assert torch.allclose(step.mean, ode_step(x, v, sigma, sigma_next, 0.0).mean)
        assert float(step.std) == 0.0


def test_sampling_with_drawn_noise_agrees_with_the_propagated_variance():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    for sigma, sigma_next in pairwise(grid(10)):
        step = flow_sde_step(x, x * velocity_gain(sigma, DATA_VARIANCE), sigma, sigma_next, 0.7)
        x = step.mean + step.std * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    assert x.var().item() == pytest.approx(sampled_variance(flow_sde_step, 10), rel=0.01)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_steps_take_one_sigma_per_row(name: str):
    step = get_sampler(name).step
    x, v = torch.randn(2, 3, 4, 8, 8)
    sigma, sigma_next = torch.tensor([1.0, 0.6, 0.3]), torch.tensor([0.9, 0.5, 0.1])
    together = step(x, v, sigma, sigma_next, 0.5)
    for i in range(3):
        alone = step(x[i : i + 1], v[i : i + 1], sigma[i], sigma_next[i], 0.5)
        assert torch.allclose(together.mean[i], alone.mean[0], atol=1e-6)
        assert torch.allclose(together.std.expand_as(x)[i], alone.std.expand(4, 8, 8), atol=1e-6)


def test_log_prob_is_that_of_torchs_normal():
    x, mean = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    std = torch.rand(5, 1, 1, 1, dtype=torch.float64) + 0.1
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x).sum((1, 2, 3))
    assert torch.allclose(gaussian_log_prob(x, Step(mean, std)), expected)


def test_kl_is_that_of_torchs_normals():
    mean, other = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    std = torch.rand(5, 1, 1, 1, dtype=torch.float64) + 0.1
    p, q = (torch.distributions.Normal(m, std.expand_as(m)) for m in (mean, other))
    expected = torch.distributions.kl_divergence(p, q).sum((1, 2, 3))
    assert torch.allclose(gaussian_kl(Step(mean, std), Step(other, std)), expected)


def test_a_misspelt_sampler_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="unknown sampler 'flow-sdee'; did you mean 'flow-sde'"):
        get_sampler("flow-sdee")
