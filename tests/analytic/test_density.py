"""Closed forms against sums over a fine lattice, which for these smooth densities are exact to many digits."""

from __future__ import annotations

import math

import pytest
import torch

from flowbench.errors import UsageError
from flowbench.testbeds.plane.density import Density, Gaussian, GaussianMixture, QuadraticForm, frontier, make_density

SPACING = 0.1
AXIS = torch.arange(-8, 8, SPACING, dtype=torch.float64)
LATTICE = torch.cartesian_prod(AXIS, AXIS)


def tensor(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


GAUSSIAN = Gaussian(tensor(0.3, -0.2), tensor([0.6, 0.2], [0.2, 0.4]))
OTHER = Gaussian(tensor(-0.5, 0.4), tensor([0.3, -0.1], [-0.1, 0.9]))
MIXTURE = GaussianMixture(tensor(0.7, 0.3), (Gaussian(tensor(-1.0, 0.3), tensor([0.2, 0.0], [0.0, 0.2])), OTHER))
LINEAR = QuadraticForm(tensor(0.8, 0.6), torch.zeros(2, 2, dtype=torch.float64), 0.1)
QUADRATIC = QuadraticForm(tensor(1.0, 0.25), tensor([1.0, 0.3], [0.3, 0.5]), -0.6)

densities = pytest.mark.parametrize("density", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
forms = pytest.mark.parametrize("reward", [LINEAR, QUADRATIC], ids=["linear", "quadratic"])


def mean_of(values: torch.Tensor, density: Density) -> torch.Tensor:
    """E[values] of values (N, ...) at the lattice's points."""
    return torch.tensordot(density.log_prob(LATTICE).exp(), values, 1) * SPACING**2


@densities
def test_densities_have_mass_one(density: Density):
    assert mean_of(torch.ones(len(LATTICE)).double(), density).item() == pytest.approx(1.0, abs=1e-9)


@densities
@pytest.mark.parametrize("sigma", [0.15, 0.5, 0.9])
def test_velocity_is_the_conditional_expectation_of_noise_minus_image(density: Density, sigma: float):
    """E[eps - x0 | x_sigma = x] by a sum over x0, where eps = (x - (1 - sigma) x0) / sigma."""
    points = tensor([0.0, 0.0], [1.0, -0.5], [-2.0, 1.5])
    v = density.velocity(points, torch.full((3,), sigma).double())
    for x, value in zip(points, v, strict=True):
        eps = (x - (1 - sigma) * LATTICE) / sigma
        weight = (-0.5 * eps.square().sum(1)).exp() * density.log_prob(LATTICE).exp()
        expected = (weight[:, None] * (eps - LATTICE)).sum(0) / weight.sum()
        assert torch.allclose(value, expected, atol=1e-8)


@densities
@pytest.mark.parametrize("sigma", [0.15, 0.7])
def test_noised_density_is_that_of_a_mix_of_image_and_noise(density: Density, sigma: float):
    for x in tensor([0.2, 0.1], [-1.0, 1.0]):
        eps = (x - (1 - sigma) * LATTICE) / sigma
        normal = (-0.5 * eps.square().sum(1)).exp() / (2 * math.pi * sigma**2)
        expected = mean_of(normal, density).log()
        assert density.log_prob(x[None], tensor(sigma)).item() == pytest.approx(expected.item(), abs=1e-8)


@densities
def test_samples_have_the_densitys_moments(density: Density):
    """Within 5 standard errors of 40,000 samples."""
    n = 40_000
    x = density.sample(n, torch.Generator().manual_seed(0))
    mean = mean_of(LATTICE, density)
    spread = mean_of((LATTICE - mean).square(), density)
    assert ((x.mean(0) - mean).abs() < 5 * (spread / n).sqrt()).all()
    kurtosis = mean_of((LATTICE - mean) ** 4, density)
    assert ((x.var(0) - spread).abs() < 5 * ((kurtosis - spread**2) / n).sqrt()).all()


@densities
@forms
def test_expected_reward_and_partition_are_those_of_the_sum(density: Density, reward: QuadraticForm):
    r = reward(LATTICE)
    assert density.expected(reward) == pytest.approx(mean_of(r, density).item(), abs=1e-8)
    for scale in (0.5, 2.0):
        expected = mean_of((scale * r).exp(), density).log().item()
        assert density.log_partition(reward, tensor(scale)[0]).item() == pytest.approx(expected, abs=1e-8)


@densities
@forms
def test_tilting_multiplies_the_density_by_exp_of_reward_over_beta(density: Density, reward: QuadraticForm):
    beta, x = 0.6, LATTICE[::497]
    constant = density.log_partition(reward, tensor(1 / beta)[0])
    expected = density.log_prob(x) + reward(x) / beta - constant
    assert torch.allclose(density.tilt(reward, beta).log_prob(x), expected, atol=1e-9)


def test_a_linear_reward_moves_a_gaussian_by_s_c_over_beta():
    beta, c, s = 0.4, LINEAR.linear, GAUSSIAN.covariance
    tilted = GAUSSIAN.tilt(LINEAR, beta)
    assert torch.allclose(tilted.mean, GAUSSIAN.mean + s @ c / beta)
    assert torch.allclose(tilted.covariance, s)
    assert tilted.expected(LINEAR) - GAUSSIAN.expected(LINEAR) == pytest.approx((c @ s @ c).item() / beta)
    assert tilted.kl(GAUSSIAN) == pytest.approx((c @ s @ c).item() / (2 * beta**2))


def test_a_quadratic_reward_narrows_a_gaussian():
    """S* = (S^-1 + Q / beta)^-1 and mean* = S* (S^-1 mean + Q y / beta) for r = -(x - y)' Q (x - y) / 2."""
    beta, y, q = 0.4, tensor(1.0, 0.5), tensor([1.0, 0.3], [0.3, 0.5])
    tilted = GAUSSIAN.tilt(QuadraticForm(q @ y, q, 0.0), beta)
    precision = torch.linalg.inv(GAUSSIAN.covariance)
    covariance = torch.linalg.inv(precision + q / beta)
    assert torch.allclose(tilted.covariance, covariance)
    assert torch.allclose(tilted.mean, covariance @ (precision @ GAUSSIAN.mean + q @ y / beta))


def test_a_linear_reward_weighs_a_mixtures_components_by_exp_of_their_means():
    """Isotropic components of one width: weights w_k exp(c . mean_k / beta), means mean_k + s^2 c / beta."""
    beta, s2, means = 0.5, 0.2, tensor([-1.0, 0.3], [0.9, 1.0])
    parts = tuple(Gaussian(m, s2 * torch.eye(2).double()) for m in means)
    tilted = GaussianMixture(tensor(0.7, 0.3), parts).tilt(LINEAR, beta)
    weights = tensor(0.7, 0.3) * (means @ LINEAR.linear / beta).exp()
    assert torch.allclose(tilted.weights, weights / weights.sum())
    for part, m in zip(tilted.components, means, strict=True):
        assert torch.allclose(part.mean, m + s2 * LINEAR.linear / beta)
        assert torch.allclose(part.covariance, s2 * torch.eye(2).double())


def test_kl_of_gaussians_is_that_of_the_sum():
    ratio = GAUSSIAN.log_prob(LATTICE) - OTHER.log_prob(LATTICE)
    assert GAUSSIAN.kl(OTHER) == pytest.approx(mean_of(ratio, GAUSSIAN).item(), abs=1e-8)
    assert GAUSSIAN.kl(GAUSSIAN) == pytest.approx(0.0, abs=1e-12)


@densities
@forms
def test_the_frontiers_points_are_those_of_the_tilted_densities(density: Density, reward: QuadraticForm):
    beta = 0.7
    tilted = density.tilt(reward, beta)
    point = frontier(density, reward).at(1 / beta)
    assert point.reward == pytest.approx(tilted.expected(reward), abs=1e-9)
    ratio = tilted.log_prob(LATTICE) - density.log_prob(LATTICE)
    assert point.kl == pytest.approx(mean_of(ratio, tilted).item(), abs=1e-8)
    assert frontier(density, reward).gain(point.kl) == pytest.approx(point.reward - density.expected(reward), abs=1e-9)


@pytest.mark.parametrize("kl", [1e-4, 0.1, 1.0, 30.0])
def test_the_frontier_of_a_linear_reward_on_a_gaussian_is_a_square_root(kl: float):
    c, s = LINEAR.linear, GAUSSIAN.covariance
    assert frontier(GAUSSIAN, LINEAR).gain(kl) == pytest.approx(math.sqrt(2 * (c @ s @ c).item() * kl))


def test_a_bounded_reward_gains_no_more_than_its_bound():
    """-x'x / 2 is at most 0: far out the frontier flattens."""
    form = QuadraticForm(tensor(0.0, 0.0), torch.eye(2).double())
    edge = frontier(GAUSSIAN, form)
    assert edge.gain(0.0) == 0.0
    assert edge.gain(8.0) < edge.gain(12.0) < -edge.base


@densities
@forms
def test_no_gaussian_lies_beyond_the_frontier(density: Density, reward: QuadraticForm):
    generator = torch.Generator().manual_seed(0)
    edge = frontier(density, reward)
    for _ in range(8):
        root = torch.eye(2).double() * 0.6 + 0.3 * torch.randn(2, 2, generator=generator, dtype=torch.float64)
        other = Gaussian(0.7 * torch.randn(2, generator=generator, dtype=torch.float64), root @ root.T)
        kl = mean_of(other.log_prob(LATTICE) - density.log_prob(LATTICE), other).item()
        assert other.expected(reward) - edge.base < edge.gain(kl)


def test_the_slope_of_a_mixtures_velocity_is_its_jacobian():
    x, h = LATTICE[::997], 1e-5
    sigma = tensor(0.4).expand(len(x))
    v, slope = MIXTURE.linearized(x, sigma)
    assert torch.allclose(v, MIXTURE.velocity(x, sigma))
    for k, step in enumerate(h * torch.eye(2).double()):
        difference = (MIXTURE.velocity(x + step, sigma) - MIXTURE.velocity(x - step, sigma)) / (2 * h)
        assert torch.allclose(slope[:, :, k], difference, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "parameters", "complaint"),
    [
        ("gausian", {}, "unknown density 'analytic:gausian'; did you mean 'gaussian'"),
        ("gaussian", {"mean": [0.0, 0.0]}, "density 'analytic:gaussian': .*covariance"),
        ("mixture", {"weights": [1.0], "means": [], "std": 1.0}, "density 'analytic:mixture'"),
        ("gaussian", {"mean": [0.0, 0.0], "covariance": [[1.0, 2.0], [2.0, 1.0]]}, "not positive definite"),
        (
            "gaussian",
            {"mean": [0.0], "covariance": [[1.0, 0.0], [0.0, 1.0]]},
            "mean has 1 dimensions, the covariance 2",
        ),
        ("mixture", {"weights": [1.0, -1.0], "means": [[0, 0], [1, 1]], "std": 1.0}, "the weights must be positive"),
    ],
)
def test_a_density_that_is_none_is_refused(kind: str, parameters: dict, complaint: str):
    with pytest.raises(UsageError, match=complaint):
        make_density(kind, parameters)
