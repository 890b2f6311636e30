"""Exact evaluation against sampling, against theory in the limit of many steps, and by two independent ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from flowbench.errors import RunError
from flowbench.evaluation.exact import (
    SPACING,
    GaussianEvaluation,
    GridEvaluation,
    disc,
    exact_evaluation,
    pull,
    push,
    quadratic_form,
    sampled_gaussian,
)
from flowbench.models.families.plane import exact_field
from flowbench.models.families.plane_field import VelocityField
from flowbench.models.policy import Policy
from flowbench.reward import Reward
from flowbench.rewards.jpeg import Jpeg
from flowbench.scoring.combination import WeightedSum
from flowbench.terms import parse_reward
from flowbench.testbeds.plane.density import Gaussian, GaussianMixture, Point, QuadraticForm, frontier

MakePolicy = Callable[..., Policy]
Form = Callable[..., QuadraticForm]
GAUSSIAN = Gaussian(torch.tensor([0.3, -0.2]).double(), torch.tensor([[0.6, 0.2], [0.2, 0.4]]).double())
OTHER = Gaussian(torch.tensor([0.7, 0.1]).double(), torch.tensor([[0.4, -0.1], [-0.1, 0.5]]).double())
models = pytest.mark.parametrize("model", ["gaussian", "mixture"])


def sigmas(steps: int) -> torch.Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def one_component(gaussian: Gaussian) -> GaussianMixture:
    return GaussianMixture(torch.ones(1).double(), (gaussian,))


def disturb(policy: Policy, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for p in policy.trainable_parameters():
        p.data += size * torch.randn(p.shape, generator=generator)


@models
def test_the_exact_reward_is_that_of_the_policys_samples(make_analytic_policy: MakePolicy, form: Form, model: str):
    """Within 5 standard errors of 20,000 samples."""
    policy, n = make_analytic_policy(model), 20_000
    disturb(policy, 0.1)
    x0 = policy.rollout(policy.encode(["p"] * n), policy.draw_noise(n)).x0.flatten(1)
    for name in ("linear", "quadratic"):
        reward = form(name, model)
        point = exact_evaluation(policy, reward, spacing=0.4).point(exact_field(policy))
        assert point is not None
        sampled = reward(x0)
        assert abs(sampled.mean().item() - point.reward) < 5 * sampled.std().item() / math.sqrt(n)


def test_the_samplers_gaussian_is_that_of_the_policys_samples(make_analytic_policy: MakePolicy):
    policy, n = make_analytic_policy(), 50_000
    disturb(policy, 0.1)
    x = policy.rollout(policy.encode(["p"] * n), policy.draw_noise(n)).x0.flatten(1).double()
    exact = sampled_gaussian(exact_field(policy), policy.sigmas(policy.preset.num_steps).double())
    variance = exact.covariance.diagonal()
    assert ((x.mean(0) - exact.mean).abs() < 5 * (variance / n).sqrt()).all()
    error = (torch.outer(variance, variance) + exact.covariance**2).div(n).sqrt()  # of a Gaussian's covariance
    assert ((torch.cov(x.T) - exact.covariance).abs() < 5 * error).all()


def test_the_euler_samplers_covariance_converges_with_order_one_and_its_mean_is_exact():
    field, errors = VelocityField(GAUSSIAN).double(), []
    for steps in (100, 200, 400):
        sampled = sampled_gaussian(field, sigmas(steps))
        assert torch.allclose(sampled.mean, GAUSSIAN.mean)
        errors.append((sampled.covariance - GAUSSIAN.covariance).norm().item())
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([1.0, 1.0], abs=0.05)


@models
def test_the_reference_sampler_is_as_near_to_its_density_as_stated(make_analytic_policy: MakePolicy, model: str):
    """docs/analytic.md states how far the reference sampler's distribution is from the density that it is made of."""
    policy = make_analytic_policy(model)
    grid, density = policy.sigmas(policy.preset.num_steps).double(), policy.transformer.density
    if isinstance(density, Gaussian):
        kl = sampled_gaussian(exact_field(policy), grid).kl(density)
    else:
        z = disc(6.0, SPACING)
        weight = (-0.5 * z.square().sum(1)).softmax(0)
        x, log_det, _ = push(exact_field(policy), grid, z)
        log_normal = -0.5 * z.square().sum(1) - math.log(2 * math.pi)
        kl = (weight * (log_normal - log_det - density.log_prob(x))).sum().item()
    assert kl == pytest.approx({"gaussian": 0.0023, "mixture": 0.0033}[model], abs=1e-4)


def test_nodes_and_affine_maps_agree_on_a_gaussian(form: Form):
    """The same field, once as a Gaussian and once as a mixture of one component."""
    for name in ("linear", "quadratic"):
        reward = form(name)
        closed = GaussianEvaluation(VelocityField(GAUSSIAN).double(), sigmas(20), reward)
        nodes = GridEvaluation(VelocityField(one_component(GAUSSIAN)).double(), sigmas(20), reward, SPACING)
        a = closed.point(VelocityField(OTHER).double())
        b = nodes.point(VelocityField(one_component(OTHER)).double())
        assert a is not None
        assert b is not None
        assert b.reward == pytest.approx(a.reward, abs=1e-6)
        assert b.kl == pytest.approx(a.kl, abs=1e-6)
        for kl in (0.2, 2.0, 20.0 if name == "linear" else 5.0):
            assert nodes.frontier(kl).gain(kl) == pytest.approx(closed.frontier(kl).gain(kl), rel=1e-6)
        assert nodes.share(b) == pytest.approx(closed.share(a), abs=1e-5)


@pytest.mark.parametrize("name", ["linear", "quadratic"])
def test_the_tilted_mixtures_field_reaches_the_optimum_as_steps_grow(
    make_analytic_policy: MakePolicy, form: Form, name: str
):
    """Its samples' E[r] and KL tend to those of theory with order 1, and lie on the frontier."""
    policy, reward, beta = make_analytic_policy("mixture"), form(name, "mixture"), 1.0
    density = policy.transformer.density
    optimum = VelocityField(density.tilt(reward, beta)).double()
    theory = frontier(density, reward).at(1 / beta)
    errors = []
    for steps in (30, 60):
        evaluation = exact_evaluation(policy, reward, steps)
        point = evaluation.point(optimum)
        assert point is not None
        assert 0.98 < evaluation.share(point) < 1 + 1e-3
        errors.append((abs(point.reward - theory.reward), abs(point.kl - theory.kl)))
    for coarse, fine in zip(*errors, strict=True):
        assert coarse / fine == pytest.approx(2.0, abs=0.5)


def test_the_maps_determinant_is_that_of_finite_differences(make_analytic_policy: MakePolicy):
    policy = make_analytic_policy("mixture")
    disturb(policy, 0.1)
    field, grid, z, h = exact_field(policy), sigmas(10), disc(2.0, 0.7), 1e-5
    columns = [(push(field, grid, z + e)[0] - push(field, grid, z - e)[0]) / (2 * h) for e in h * torch.eye(2).double()]
    expected = torch.stack(columns, 2).det().abs().log()
    assert torch.allclose(push(field, grid, z)[1], expected, atol=1e-6)


def test_pulling_back_undoes_the_reference_sampler(make_analytic_policy: MakePolicy):
    policy = make_analytic_policy("mixture")
    density, grid, z = policy.transformer.density, policy.sigmas(10).double(), disc(6.0, 0.5)
    assert isinstance(density, GaussianMixture)
    x, log_det, folded = push(exact_field(policy), grid, z)
    assert not folded.any()  # each step is the gradient of a convex function
    back, log_det_back = pull(density, grid, x)
    assert torch.allclose(back, z, atol=1e-7)
    assert torch.allclose(log_det_back, log_det, atol=1e-7)


def test_halving_the_spacing_of_the_nodes_changes_little(make_analytic_policy: MakePolicy, form: Form):
    """docs/analytic.md states this tolerance."""
    policy = make_analytic_policy("mixture")
    disturb(policy, 0.15)
    points = [exact_evaluation(policy, form("linear", "mixture"), 20, s).point(exact_field(policy)) for s in (0.2, 0.1)]
    coarse, fine = (p for p in points if p is not None)
    assert fine.kl > 0.05
    assert abs(coarse.reward - fine.reward) < 1e-3
    assert abs(coarse.kl - fine.kl) < 1e-2 * fine.kl


class Folding(VelocityField):
    """A field with a slope so steep that a step of 1 / 10 turns the plane over along the first axis."""

    def linearized(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slope = torch.zeros(len(x), 2, 2, dtype=x.dtype)
        slope[:, 0, 0] = 40 * torch.cos(4 * x[:, 0])
        return torch.stack([10 * torch.sin(4 * x[:, 0]), 0 * x[:, 1]], 1), slope


def test_a_map_that_folds_has_no_point(form: Form):
    density = one_component(GAUSSIAN)
    evaluation = GridEvaluation(VelocityField(density).double(), sigmas(10), form("linear"), SPACING)
    assert evaluation.point(Folding(density)) is None


class Collapsing(VelocityField):
    """v = x / sigma, whose last step takes every point to 0."""

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x / sigma[:, None]


def test_a_collapsed_gaussian_has_no_point(form: Form):
    evaluation = GaussianEvaluation(VelocityField(GAUSSIAN).double(), sigmas(2), form("linear"))
    assert evaluation.point(Collapsing(GAUSSIAN)) is None


class Exploding(VelocityField):
    """A field whose samples leave the numbers' range."""

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return -1e40 * x

    def linearized(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return -1e40 * x, -1e40 * torch.eye(2).double().expand(len(x), 2, 2)


def test_samples_out_of_range_have_no_point(form: Form):
    reward, density = form("linear"), one_component(GAUSSIAN)
    closed = GaussianEvaluation(VelocityField(GAUSSIAN).double(), sigmas(10), reward)
    nodes = GridEvaluation(VelocityField(density).double(), sigmas(10), reward, SPACING)
    assert closed.point(Exploding(GAUSSIAN)) is None
    assert nodes.point(Exploding(density)) is None


def test_points_far_from_the_reference_are_judged_too(form: Form):
    """A million deviations away: Newton's method stays relative to the numbers' size."""
    far = Gaussian(GAUSSIAN.mean + 1e6, GAUSSIAN.covariance)
    closed = GaussianEvaluation(VelocityField(GAUSSIAN).double(), sigmas(10), form("linear"))
    nodes = GridEvaluation(VelocityField(one_component(GAUSSIAN)).double(), sigmas(10), form("linear"), SPACING)
    a = closed.point(VelocityField(far).double())
    b = nodes.point(VelocityField(one_component(far)).double())
    assert a is not None
    assert b is not None
    assert b.kl == pytest.approx(a.kl, rel=1e-6)


@models
def test_the_reference_stands_at_the_frontiers_foot(make_analytic_policy: MakePolicy, form: Form, model: str):
    policy = make_analytic_policy(model)
    evaluation = exact_evaluation(policy, form("linear", model), 20)
    point = evaluation.point(exact_field(policy, "reference"))
    assert point is not None
    assert point.kl == pytest.approx(0.0, abs=1e-9)
    assert point.reward == pytest.approx(evaluation.frontier(0.0).base, abs=1e-4)
    assert evaluation.share(Point(point.reward, 0.0)) == 0.0


def test_a_weighted_sum_of_rewards_is_the_sum_of_their_forms(point_reward: Callable[..., Reward]):
    terms = parse_reward("linear:2+quadratic:-0.5")
    total = WeightedSum(terms, {t.name: point_reward(t.name) for t in terms})
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    expected = total.score(x[:, :, None, None], ("p",) * 7)
    assert torch.allclose(quadratic_form(total)(x), expected, atol=1e-6)


def test_a_reward_without_a_quadratic_form_is_named():
    with pytest.raises(RunError, match="reward 'jpeg' has no quadratic form"):
        quadratic_form(Jpeg())


def test_rewards_are_their_forms_and_pass_gradients(point_reward: Callable[..., Any]):
    x = torch.tensor([[1.0, 2.0], [-0.5, 0.3]]).requires_grad_()
    images = x[:, :, None, None]
    linear, quadratic = point_reward("linear"), point_reward("quadratic")
    c, y, q = (torch.tensor(v) for v in (linear.direction, quadratic.target, quadratic.precision))
    assert torch.allclose(linear.score(images, ("p", "q")), x @ c + linear.offset)
    expected = -0.5 * torch.einsum("ni,ij,nj->n", x - y, q, x - y)
    assert torch.allclose(quadratic.score(images, ("p", "q")), expected, atol=1e-6)
    (gradient,) = torch.autograd.grad(quadratic.score(images, ("p", "q")).sum(), x)
    assert torch.allclose(gradient, -(x - y) @ q, atol=1e-6)
