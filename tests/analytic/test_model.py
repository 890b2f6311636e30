"""The analytic models as policies: what the trainer and the algorithms may rely on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy.special import eval_legendre

from flowbench.errors import UsageError
from flowbench.models.families.plane_field import DEGREE, AffineCorrection, NetworkCorrection
from flowbench.models.policy import Policy, Tuning

MakePolicy = Callable[..., Policy]
models = pytest.mark.parametrize("model", ["gaussian", "mixture"])


def disturb(policy: Policy, size: float = 0.1) -> None:
    """Random weights of the correction."""
    generator = torch.Generator().manual_seed(1)
    for p in policy.trainable_parameters():
        p.data += size * torch.randn(p.shape, generator=generator)


@models
def test_before_training_the_velocity_is_the_references(make_analytic_policy: MakePolicy, model: str):
    policy = make_analytic_policy(model)
    x, sigma, cond = policy.draw_noise(5), torch.rand(5), policy.encode(["a", "b", "a", "c", "a"])
    exact = policy.transformer.density.velocity(x.flatten(1), sigma).view_as(x)
    assert torch.equal(policy.velocity(x, sigma, cond), exact)
    disturb(policy)
    assert not torch.allclose(policy.velocity(x, sigma, cond), exact, atol=1e-3)
    assert torch.equal(policy.velocity(x, sigma, cond, "reference"), exact)


@models
def test_points_are_their_own_images(make_analytic_policy: MakePolicy, model: str):
    policy = make_analytic_policy(model)
    latents = (100 * policy.draw_noise(3)).requires_grad_()
    assert latents.shape == (3, 2, 1, 1)
    images = policy.decode(latents)
    assert torch.equal(images, latents)
    (gradient,) = torch.autograd.grad(images.sum(), latents)
    assert torch.equal(gradient, torch.ones(3, 2, 1, 1))


@models
def test_every_prompt_has_the_same_distribution(make_analytic_policy: MakePolicy, model: str):
    policy = make_analytic_policy(model)
    disturb(policy)
    noise = policy.draw_noise(2)
    first, second = (policy.rollout(policy.encode([p] * 2), noise).x0 for p in ("a point", "another"))
    assert torch.equal(first, second)


@models
def test_the_old_view_follows_the_current_weights(make_analytic_policy: MakePolicy, model: str):
    policy = make_analytic_policy(model)
    policy.add_view("old")
    x, sigma, cond = policy.draw_noise(4), torch.rand(4), policy.encode(["p"] * 4)
    before = policy.velocity(x, sigma, cond)
    disturb(policy)
    assert torch.equal(policy.velocity(x, sigma, cond, "old"), before)
    policy.update_view("old", decay=0.0)
    assert torch.equal(policy.velocity(x, sigma, cond, "old"), policy.velocity(x, sigma, cond))


@models
def test_tuned_weights_are_saved_and_the_state_round_trips(
    make_analytic_policy: MakePolicy, model: str, tmp_path: Path
):
    policy, other = make_analytic_policy(model), make_analytic_policy(model)
    disturb(policy)
    policy.save(tmp_path)
    saved = load_file(tmp_path / "transformer" / "correction.safetensors")
    assert saved.keys() == dict(policy.transformer.correction.named_parameters()).keys()
    other.transformer.correction.load_state_dict(saved, strict=False)
    third = make_analytic_policy(model)
    third.load_state_dict(policy.state_dict())
    for a, b, c in zip(*(p.trainable_parameters() for p in (policy, other, third)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_lora_is_refused(make_analytic_policy: MakePolicy):
    with pytest.raises(UsageError, match=r"model 'gaussian' has no layers for LoRA; use training\.tuning=full"):
        make_analytic_policy("gaussian", tuning=Tuning("lora"))


def test_the_gaussians_correction_is_affine_in_x_and_a_polynomial_in_sigma():
    correction = AffineCorrection(2).double()
    generator = torch.Generator().manual_seed(0)
    for p in correction.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    x, sigma = torch.randn(20, 2, generator=generator, dtype=torch.float64), torch.rand(20).double()
    p = torch.stack([torch.from_numpy(eval_legendre(k, 2 * sigma.numpy() - 1)) for k in range(DEGREE + 1)], 1)
    expected = torch.einsum("nk,ki->ni", p, correction.shift) + torch.einsum("nk,kij,nj->ni", p, correction.gain, x)
    assert torch.allclose(correction(x, sigma), expected)


def test_the_slope_of_the_networks_correction_is_its_jacobian():
    torch.manual_seed(0)
    correction = NetworkCorrection(2).double()
    torch.nn.init.normal_(correction.layers[-1].weight)
    x, sigma, h = torch.randn(30, 2).double(), torch.full((30,), 0.3).double(), 1e-5
    with torch.no_grad():
        value, slope = correction.linearized(x, sigma)
        assert torch.allclose(value, correction(x, sigma))
        for k, step in enumerate(h * torch.eye(2).double()):
            difference = (correction(x + step, sigma) - correction(x - step, sigma)) / (2 * h)
            assert torch.allclose(slope[:, :, k], difference, atol=1e-8)
