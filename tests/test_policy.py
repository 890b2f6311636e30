from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.errors import RunError, UsageError
from flowbench.models.activations import own_gelu
from flowbench.models.families import load_pipeline
from flowbench.models.flow import SAMPLERS, gaussian_log_prob
from flowbench.models.policy import Policy, Tuning
from flowbench.models.presets import ModelPreset
from flowbench.training.state import load_state, save_state

LORA = Tuning("lora", lora_rank=4, lora_alpha=8.0)
FULL = Tuning("full")
PROMPTS = ("a red circle", "two crosses", "a red circle")
MakePolicy = Callable[..., Policy]


def perturb(policy: Policy, seed: int = 0) -> None:
    """As training would: every trained parameter moves (LoRA's start makes no difference)."""
    generator = torch.Generator().manual_seed(seed)
    for p in policy.trainable_parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)


def inputs(policy: Policy) -> tuple:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *policy.latent_shape, generator=generator)
    return x, torch.tensor([0.2, 0.5, 0.9]), policy.encode(PROMPTS)


@torch.no_grad()
def velocity(policy: Policy, weights: str = "current") -> torch.Tensor:
    return policy.velocity(*inputs(policy), weights=weights)


def test_the_velocity_is_that_of_the_plain_diffusers_transformer(shared_policy: Policy, preset: ModelPreset):
    plain = load_pipeline(preset, torch.device("cpu"))
    x, sigma, _ = inputs(shared_policy)
    tokens, _, pooled, _ = plain.encode_prompt(
        list(PROMPTS), None, None, do_classifier_free_guidance=False, max_sequence_length=preset.max_sequence_length
    )
    with torch.no_grad():
        expected = plain.transformer(x, tokens, pooled, timestep=sigma * 1000, return_dict=False)[0]
    assert torch.allclose(velocity(shared_policy), expected, atol=1e-5)


@pytest.mark.parametrize("how", ["sigmas", "scheduler", "own"])
def test_the_ode_sampler_draws_what_the_plain_diffusers_pipeline_draws(
    pipeline: Any, preset: ModelPreset, how: str
) -> None:
    """The model's even grid, given to the call or to the scheduler's configuration; or the scheduler's own grid."""
    assert preset.sigma_spacing == "linspace"
    spacing = "pipeline" if how == "own" else "linspace"
    policy = Policy(copy.deepcopy(pipeline), preset.model_copy(update={"sigma_spacing": spacing}))
    plain = load_pipeline(preset, torch.device("cpu"))
    plain.set_progress_bar_config(disable=True)
    if how == "scheduler":  # as docs/sampling.md says, for a model without shift
        plain.scheduler = type(plain.scheduler).from_config(plain.scheduler.config, shift_terminal=1 / 4)
    noise = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    prompts = ["a red circle", "two crosses"]
    expected = plain(
        prompt=prompts,
        latents=noise.clone(),
        height=preset.resolution,
        width=preset.resolution,
        num_inference_steps=4,
        sigmas=[1.0, 0.75, 0.5, 0.25] if how == "sigmas" else None,
        guidance_scale=1.0,
        max_sequence_length=preset.max_sequence_length,
        output_type="latent",
    ).images
    ours = policy.rollout(policy.encode(prompts), noise, num_steps=4).x0
    assert torch.allclose(ours, expected, atol=1e-4)


def test_encoding_keeps_one_embedding_per_text(shared_policy: Policy):
    cond = shared_policy.encode(PROMPTS)
    assert cond.index.tolist() == [0, 1, 0]
    assert len(cond.tensors["tokens"]) == len(cond.tensors["pooled"]) == 2
    alone = shared_policy.encode(["two crosses"])
    assert torch.equal(alone.tensors["pooled"][0], cond.tensors["pooled"][1])
    assert cond.select(torch.tensor([2, 1])).index.tolist() == [0, 1]


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_tuning_starts_at_the_reference_and_leaves_it_unchanged(make_policy: MakePolicy, tuning: Tuning):
    policy = make_policy(tuning)
    reference = velocity(policy, "reference")
    assert torch.allclose(velocity(policy), reference, atol=1e-6)
    perturb(policy)
    assert torch.equal(velocity(policy, "reference"), reference)
    assert (velocity(policy) - reference).abs().max() > 1e-3


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_only_the_current_view_has_gradients_and_looking_at_others_keeps_it_trainable(
    make_policy: MakePolicy, tuning: Tuning
):
    policy = make_policy(tuning)
    policy.add_view("old")
    perturb(policy)
    for view in ("reference", "old"):
        assert not policy.velocity(*inputs(policy), weights=view).requires_grad
    policy.velocity(*inputs(policy)).square().mean().backward()
    assert all(p.requires_grad for p in policy.trainable_parameters())
    assert sum(p.grad is not None and p.grad.abs().max() > 0 for p in policy.trainable_parameters()) > 10


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_the_old_view_stays_behind_and_follows_by_its_decay(make_policy: MakePolicy, tuning: Tuning):
    policy = make_policy(tuning)
    perturb(policy, seed=0)
    policy.add_view("old")
    at_copy = velocity(policy, "old")
    # An adapter of a view that is not trained is merged into the weights, which rounds otherwise.
    torch.testing.assert_close(velocity(policy), at_copy, rtol=1e-4, atol=1e-5)
    before = [p.detach().clone() for p in policy.trainable_parameters()]
    perturb(policy, seed=1)
    assert torch.equal(velocity(policy, "old"), at_copy)
    policy.update_view("old", decay=0.75)
    for old, b, p in zip(policy.state_dict()["old"], before, policy.trainable_parameters(), strict=True):
        assert torch.allclose(old, 0.75 * b + 0.25 * p, atol=1e-6)


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_weights_and_added_views_come_back_bit_for_bit(make_policy: MakePolicy, tuning: Tuning, tmp_path: Path):
    policy, other = make_policy(tuning), make_policy(tuning)
    for p in (policy, other):
        p.add_view("old")
        p.add_view("average")
    perturb(policy)
    policy.update_view("average", decay=0.5)
    save_state(tmp_path / "s", policy.state_dict())
    other.load_state_dict(load_state(tmp_path / "s"))
    for view in ("current", "old", "average", "reference"):
        assert torch.equal(velocity(policy, view), velocity(other, view))
    assert not torch.equal(velocity(policy, "old"), velocity(policy, "average"))


def test_a_second_lora_view_is_added_without_a_warning(make_policy: MakePolicy, recwarn: pytest.WarningsRecorder):
    policy = make_policy(LORA)
    policy.add_view("old")
    policy.add_view("average")
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_a_view_that_nobody_asked_for_is_refused(make_policy: MakePolicy, tuning: Tuning):
    policy = make_policy(tuning)
    with pytest.raises(UsageError, match="weight view 'old' does not exist"):
        velocity(policy, "old")
    with pytest.raises(UsageError, match="weight view 'newer' cannot be added"):
        policy.add_view("newer")


def test_saved_lora_weights_load_in_plain_diffusers(make_policy: MakePolicy, preset: ModelPreset, tmp_path: Path):
    policy = make_policy(LORA)
    perturb(policy)
    policy.save(tmp_path)
    plain = load_pipeline(preset, torch.device("cpu"))
    x, sigma, cond = inputs(policy)

    def plain_velocity() -> torch.Tensor:
        tokens, pooled = cond.rows().values()
        with torch.no_grad():
            return plain.transformer(x, tokens, pooled, timestep=sigma * 1000, return_dict=False)[0]

    assert (plain_velocity() - velocity(policy)).abs().max() > 1e-3
    plain.load_lora_weights(tmp_path)
    assert torch.allclose(plain_velocity(), velocity(policy), atol=1e-5)


def test_a_saved_transformer_loads_in_plain_diffusers(make_policy: MakePolicy, tmp_path: Path):
    from diffusers import SD3Transformer2DModel

    policy = make_policy(FULL)
    perturb(policy)
    policy.save(tmp_path)
    plain = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    x, sigma, cond = inputs(policy)
    with torch.no_grad():
        v = plain(x, *cond.rows().values(), timestep=sigma * 1000, return_dict=False)[0]
        with own_gelu(policy.transformer):
            assert torch.equal(v, velocity(policy))


def test_guidance_extrapolates_from_the_empty_prompt(make_policy: MakePolicy):
    policy = make_policy()
    policy.preset = policy.preset.model_copy(update={"guidance_scale": 3.0})
    x, sigma, cond = inputs(policy)
    with torch.no_grad():
        empty = policy.velocity(x, sigma, policy.encode([""] * 3))
        expected = empty + 3.0 * (velocity(policy) - empty)
        assert torch.allclose(policy.guided_velocity(x, sigma, cond), expected, atol=1e-4)  # both in one call


def test_training_has_steps_and_guidance_of_its_own(make_policy: MakePolicy):
    """Losses and training rollouts follow them; a plain rollout, as evaluations make it, has the preset's."""
    policy = make_policy(num_steps=3, guidance_scale=2.0)
    x, sigma, cond = inputs(policy)
    with torch.no_grad():
        empty = policy.velocity(x, sigma, policy.encode([""] * 3))
        expected = empty + 2.0 * (velocity(policy) - empty)
        assert torch.allclose(policy.guided_velocity(x, sigma, cond), expected, atol=1e-4)  # both in one call
    noise = policy.draw_noise(3)
    plain = policy.rollout(cond, noise)
    assert len(plain.sigmas) == policy.preset.num_steps + 1
    assert torch.equal(plain.x0, make_policy().rollout(cond, noise).x0)
    guided = policy.rollout(cond, noise, guidance_scale=2.0)
    assert (guided.x0 - plain.x0).abs().max() > 1e-3


def test_steps_outside_the_window_are_ode_steps_without_a_density(make_policy: MakePolicy):
    policy = make_policy(sampler="flow-sde")
    cond, noise = policy.encode(PROMPTS), policy.draw_noise(3)
    samples = policy.rollout(cond, noise, sampler=SAMPLERS["flow-sde"], window=range(1, 3), keep_states=True)
    assert samples.log_prob.isfinite().tolist() == [[False, True, True, False]] * 3
    ode = policy.rollout(cond, noise, keep_states=True)
    assert torch.equal(samples.states[:, 1], ode.states[:, 1])
    assert not torch.allclose(samples.states[:, 2], ode.states[:, 2], atol=1e-2)
    everything = policy.rollout(cond, noise, sampler=SAMPLERS["flow-sde"], window=range(4))
    assert everything.log_prob.isfinite().all()


@pytest.mark.parametrize("sampler", ["ode", "flow-sde"])
def test_denoising_from_a_state_of_a_rollout_reaches_its_image(make_policy: MakePolicy, sampler: str):
    """With the generator where the rollout had it, so that a stochastic sampler draws the same noise."""
    policy = make_policy(sampler=sampler)
    cond, noise = policy.encode(PROMPTS), policy.draw_noise(3)
    policy.generator = torch.Generator().manual_seed(5)
    samples = policy.rollout(cond, noise, sampler=SAMPLERS[sampler], keep_states=True)
    policy.generator = torch.Generator().manual_seed(5)
    if sampler == "flow-sde":
        policy.draw_noise(6)  # of the first two steps
    noise = torch.stack([policy.draw_noise(3) for _ in samples.sigmas[3:]], 1)
    x0 = policy.denoise(samples.states[:, 2], samples.sigmas[2:], cond, noise)
    assert torch.allclose(x0, samples.x0, atol=1e-5)
    assert x0.requires_grad


@pytest.mark.parametrize("distribution", ["logit-normal", "uniform", "sampler"])
def test_sigmas_are_drawn_from_the_distribution_that_is_named(make_policy: MakePolicy, distribution: str):
    policy = make_policy(sigma_distribution=distribution)
    sigma = policy.draw_sigmas(500)
    assert sigma.min() > 0
    if distribution == "sampler":
        assert set(sigma.tolist()) == set(policy.sigmas(policy.preset.num_steps)[:-1].tolist())
    else:
        quartiles = {"uniform": (0.25, 0.75), "logit-normal": (0.3375, 0.6625)}[distribution]
        measured = sigma.quantile(torch.tensor([0.25, 0.75])).tolist()
        assert measured == pytest.approx(quartiles, abs=0.06)


def test_the_logit_normal_is_centred_where_it_is_told(make_policy: MakePolicy):
    logit = make_policy(sigma_distribution="logit-normal", sigma_logit=(0.8, 0.35)).draw_sigmas(2000).logit()
    assert logit.mean().item() == pytest.approx(0.8, abs=0.04)
    assert logit.std().item() == pytest.approx(0.35, abs=0.03)


def test_a_rollout_depends_on_its_generator_alone(make_policy: MakePolicy):
    policy = make_policy(sampler="flow-sde")
    cond = policy.encode(PROMPTS)

    def draw(seed: int) -> torch.Tensor:
        policy.generator = torch.Generator().manual_seed(seed)
        return policy.rollout(cond, policy.draw_noise(3), sampler=SAMPLERS["flow-sde"]).x0

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_a_rollout_counts_its_function_evaluations(make_policy: MakePolicy):
    policy = make_policy()
    policy.rollout(policy.encode(PROMPTS), policy.draw_noise(3), num_steps=5)
    assert policy.function_evaluations == 15


def test_kept_states_lead_from_the_noise_to_the_image(make_policy: MakePolicy):
    policy = make_policy()
    noise = policy.draw_noise(3)
    samples = policy.rollout(policy.encode(PROMPTS), noise, keep_states=True)
    assert samples.states.shape == (3, 5, *policy.latent_shape)
    assert torch.equal(samples.states[:, 0], noise)
    assert torch.equal(samples.states[:, -1], samples.x0)
    assert samples.log_prob is None
    assert samples.sigmas[0] == 1
    assert samples.sigmas[-1] == 0


def test_decoded_images_are_differentiable_and_in_the_unit_interval(shared_policy: Policy):
    latents = torch.randn(2, *shared_policy.latent_shape, requires_grad=True)
    images = shared_policy.decode(latents)
    assert images.shape == (2, 3, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.autograd.grad(images.sum(), latents)[0].abs().max() > 0


def test_missing_weights_are_reported_with_the_remedy(preset: ModelPreset):
    absent = preset.model_copy(update={"source": "embedded:absent-model"})
    with pytest.raises(RunError, match=r"cannot be loaded from .*; rebuild it with 'flowbench testbed") as raised:
        load_pipeline(absent, torch.device("cpu"))
    assert len(str(raised.value).splitlines()) == 1


# --- gradients through weight views -----------------------------------------------------------------------------------


def x_gradient(policy: Policy, weights: str) -> torch.Tensor:
    x, sigma, cond = inputs(policy)
    x.requires_grad_()
    v = policy.velocity(x, sigma, cond, weights=weights, grad=True)
    return torch.autograd.grad(v.square().sum(), x)[0]


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_the_velocity_of_any_view_is_differentiable_in_x_on_request(make_policy: MakePolicy, tuning: Tuning):
    policy = make_policy(tuning)
    perturb(policy)
    policy.add_view("old")
    perturb(policy, seed=1)
    x, sigma, cond = inputs(policy)
    step, h = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), 2e-3
    for weights in ("current", "reference", "old"):
        slope = (x_gradient(policy, weights) * step).sum()
        with torch.no_grad():
            up, down = (policy.velocity(x + d * step, sigma, cond, weights).square().sum() for d in (h, -h))
        assert slope.item() == pytest.approx((up - down).item() / (2 * h), rel=2e-2)


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_no_view_but_the_current_one_has_gradients_of_its_weights(make_policy: MakePolicy, tuning: Tuning):
    policy = make_policy(tuning)
    policy.add_view("old")
    x, sigma, cond = inputs(policy)
    x.requires_grad_()
    (
        policy.velocity(x, sigma, cond, "old", grad=True) + policy.velocity(x, sigma, cond, "reference", grad=True)
    ).sum().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is None for p in policy.trainable_parameters())
    assert all(p.grad is None and not p.requires_grad for p in policy.views.parameters("old"))
    assert all(p.requires_grad for p in policy.trainable_parameters())


# --- gradient checkpointing -------------------------------------------------------------------------------------------


def switched_gradients(policy: Policy, first: str, then: str) -> list[torch.Tensor]:
    """Gradients in x and the trained weights of a view's velocity, with another view active when they are computed."""
    x, sigma, cond = inputs(policy)
    x.requires_grad_()
    v = policy.velocity(x, sigma, cond, weights=first, grad=True)
    with policy.views.use(then):
        v.square().sum().backward()
    trained = [p.grad for p in policy.trainable_parameters() if p.grad is not None]
    for p in policy.trainable_parameters():
        p.grad = None
    assert bool(trained) == (first == "current")
    return [x.grad, *trained]


@pytest.mark.parametrize(
    ("first", "then"),
    [("current", "reference"), ("current", "old"), ("reference", "current"), ("old", "current"), ("old", "reference")],
)
def test_a_recomputation_sees_the_weight_view_of_its_first_pass(make_policy: MakePolicy, first: str, then: str):
    policies = [make_policy(LORA, gradient_checkpointing=g) for g in (False, True)]
    for policy in policies:
        perturb(policy)
        policy.add_view("old")
        perturb(policy, seed=1)
    plain, recomputed = (switched_gradients(policy, first, then) for policy in policies)
    assert policies[1].transformer.is_gradient_checkpointing
    assert len(plain) == len(recomputed) == (1 if first != "current" else 1 + len(policies[0].trainable_parameters()))
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert policies[1].views.active == "current"
    assert torch.equal(velocity(policies[0]), velocity(policies[1]))


def test_a_recomputation_can_be_repeated(make_policy: MakePolicy):
    policy = make_policy(LORA, gradient_checkpointing=True)
    x, sigma, cond = inputs(policy)
    x.requires_grad_()
    total = policy.velocity(x, sigma, cond, "reference", grad=True).sum()
    first, second = (torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# --- what an algorithm may ask of a rollout ---------------------------------------------------------------------------

SDE = SAMPLERS["flow-sde"]


def test_images_of_a_group_share_their_path_up_to_the_branch_and_then_part(make_policy: MakePolicy):
    policy = make_policy(sampler="flow-sde")
    group = torch.tensor([1, 0, 1, 0, 1])
    cond = policy.encode(["two crosses", "a red circle"] * 2 + ["two crosses"])
    samples = policy.rollout(
        cond, policy.draw_noise(5), sampler=SDE, group=group, branch_step=2, keep_states=True, keep_steps=True
    )
    ones, zeros = samples.states[group == 1], samples.states[group == 0]
    for rows in (ones, zeros):
        assert torch.equal(rows[:1, :3].expand_as(rows[:, :3]), rows[:, :3])
        assert (rows[0, 3:] - rows[1, 3:]).flatten(1).abs().amax(1).min() > 1e-2
    assert (ones[0, :3] - zeros[0, :3]).flatten(1).abs().amax(1).min() > 1e-2
    assert torch.equal(samples.states[:, -1], samples.x0)
    assert policy.function_evaluations == 2 * 2 + 2 * 5
    # Shared or not, each step is the sampler's own from the state where it was taken.
    for k in range(4):
        sigma, sigma_next = samples.sigmas[k].expand(5), samples.sigmas[k + 1].expand(5)
        with torch.no_grad():
            step = policy.transition(samples.states[:, k], sigma, sigma_next, cond)
        torch.testing.assert_close(samples.mean[:, k], step.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(samples.std[:, k], step.std.flatten())
        torch.testing.assert_close(
            samples.log_prob[:, k], gaussian_log_prob(samples.states[:, k + 1], step), rtol=1e-3, atol=1e-2
        )


def test_branching_at_step_zero_shares_the_first_noise_alone(make_policy: MakePolicy):
    policy = make_policy(sampler="flow-sde")
    noise, cond = policy.draw_noise(2), policy.encode(["two crosses"] * 2)
    samples = policy.rollout(
        cond, noise, sampler=SDE, group=torch.zeros(2, dtype=torch.int64), branch_step=0, keep_states=True
    )
    assert torch.equal(samples.states[:, 0], noise[:1].expand_as(noise))
    assert (samples.states[0, 1] - samples.states[1, 1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"sampler": SDE, "branch_step": 1}, "give group"),
        (
            {"sampler": SDE, "branch_step": 4, "group": torch.zeros(3, dtype=torch.int64)},
            "from 0 to 3, for 4 sampler steps",
        ),
        ({"branch_step": 1, "group": torch.zeros(3, dtype=torch.int64)}, "never part"),
    ],
)
def test_branches_that_cannot_part_are_refused(shared_policy: Policy, arguments: dict, complaint: str):
    with pytest.raises(UsageError, match=complaint):
        shared_policy.rollout(shared_policy.encode(PROMPTS), shared_policy.draw_noise(3), **arguments)


def test_steps_of_the_ode_are_kept_with_no_deviation(shared_policy: Policy):
    samples = shared_policy.rollout(
        shared_policy.encode(PROMPTS), shared_policy.draw_noise(3), keep_states=True, keep_steps=True
    )
    assert torch.equal(samples.mean, samples.states[:, 1:])
    assert torch.equal(samples.std, torch.zeros(3, 4))


def test_a_completion_from_any_state_of_an_ode_rollout_reaches_its_image(shared_policy: Policy):
    cond = shared_policy.encode(PROMPTS)
    samples = shared_policy.rollout(cond, shared_policy.draw_noise(3), keep_states=True)
    step = torch.tensor([3, 0, 2])
    before = shared_policy.function_evaluations
    x0 = shared_policy.complete(samples.states[torch.arange(3), step], step, samples.sigmas, cond)
    assert torch.allclose(x0, samples.x0, atol=1e-4)
    assert not x0.requires_grad
    assert shared_policy.function_evaluations - before == 1 + 4 + 2
    together = shared_policy.complete(samples.states[:, 2], 2, samples.sigmas, cond, weights="reference")
    assert torch.allclose(together, samples.x0, atol=1e-5)
