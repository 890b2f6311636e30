"""What acflow's critics are shown, when they learn, and what they cost."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small import minibatch_loss

from flowbench.algorithm import Batch
from flowbench.algorithms.acflow import AcFlow
from flowbench.config import RunConfig
from flowbench.models.flow import interpolate, predict_x0
from flowbench.models.policy import Policy
from flowbench.rollout import Rollout, centered_within
from flowbench.toolkit.critic import (
    Sight,
    StateCritic,
    errors_within_prompts,
    explained_by_sigma,
    sight,
)
from flowbench.toolkit.seeing import LeastSquaresCritic, PreviewCritic, make_critic
from flowbench.training.rows import Cut, compared, drawn
from flowbench.training.state import load_state, save_state
from flowbench.training.trainer import Trainer

KINDS = ("shaped", "direct", "sees", "preview")
PROMPTS = ("a red circle", "two crosses", "a small square")
PAGE = Path(__file__).parents[2] / "docs/algorithms/acflow.md"

MakeTrainer = Callable[..., Trainer]
TinyConfig = Callable[..., RunConfig]


def brightness(images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
    """A reward that knows text and image."""
    return images.mean((1, 2, 3)) + torch.tensor([0.1 * len(p) for p in prompts])


@pytest.fixture
def rollout(shared_policy: Policy) -> Rollout:
    """Twelve images of three prompts, with random rewards."""
    generator = torch.Generator().manual_seed(0)
    prompts = tuple(p for p in PROMPTS for _ in range(4))
    x0 = torch.randn(12, *shared_policy.latent_shape, generator=generator)
    states = torch.randn(12, 5, *shared_policy.latent_shape, generator=generator)
    return Rollout(
        iteration=10,
        prompts=prompts,
        group=torch.arange(3).repeat_interleave(4),
        cond=shared_policy.encode(prompts),
        sigmas=torch.linspace(1, 0, 5),
        x0=x0,
        images=torch.zeros(12, 3, 4, 4),
        reward=torch.randn(12, generator=generator),
        states=states,
    )


def build(policy: Policy, kind: str, **settings: Any) -> AcFlow:
    """An algorithm whose critic has learned something, so that its values are not 0."""
    algorithm = AcFlow(AcFlow.Config(critic=kind, warmup=0, shaping="normalize", **settings), brightness)
    algorithm.setup(policy)
    policy.generator = torch.Generator().manual_seed(1)
    critic = algorithm.critics["value"]
    if isinstance(critic.network, StateCritic):
        torch.nn.init.normal_(critic.network.head[-1].weight)
    return algorithm


def taught(policy: Policy, kind: str, rollout: Rollout, **settings: Any) -> tuple[AcFlow, Batch]:
    """The same after an iteration on the rollout, and the rows of the next."""
    algorithm = build(policy, kind, **settings)
    compared(algorithm, policy, drawn(algorithm, policy, algorithm.prepare(rollout)), Cut(12))
    algorithm.after_iteration(policy)
    return algorithm, drawn(algorithm, policy, algorithm.prepare(rollout))


@torch.no_grad()
def values(algorithm: AcFlow, policy: Policy, batch: Batch) -> torch.Tensor:
    return algorithm.measure(policy, batch)["value"]


# --- what they see ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", ["renoised", "trajectory"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_critic_never_sees_the_clean_image_of_the_row_that_it_judges(
    shared_policy: Policy, rollout: Rollout, kind: str, states: str
):
    """Another x0 with the same x_sigma, sigma and text changes no value; another x_sigma does."""
    algorithm, batch = taught(shared_policy, kind, rollout, states=states)
    other = torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(5))
    if states == "renoised":
        eps, sigma = batch.draw()
        s = sigma.view(-1, 1, 1, 1)
        noise = (interpolate(batch.x0, eps, sigma) - (1 - s) * other) / s
        swapped = replace(batch, x0=other, noise=noise[:, None])
        moved = replace(batch, noise=batch.noise + 0.5)
    else:
        x, _ = batch.state()
        swapped, moved = replace(batch, x0=other), replace(batch, x=x + 0.5)
    before = values(algorithm, shared_policy, batch)
    assert before.abs().min() > 0
    torch.testing.assert_close(values(algorithm, shared_policy, swapped), before, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(values(algorithm, shared_policy, moved), before, rtol=1e-2, atol=1e-3)


def test_a_critic_is_handed_neither_image_nor_noise(shared_policy: Policy, rollout: Rollout):
    assert {f.name for f in fields(Sight)} == {"x", "sigma", "cond", "prompts", "target", "group"}
    algorithm = build(shared_policy, "sees")
    batch = drawn(algorithm, shared_policy, algorithm.prepare(rollout))
    rows = sight(batch)
    eps, sigma = batch.draw()
    assert torch.equal(rows.x, interpolate(batch.x0, eps, sigma))
    assert torch.equal(rows.sigma, sigma)
    assert torch.equal(rows.target, batch.advantage)
    assert rows.prompts == batch.prompts


def test_the_network_receives_state_sigma_and_each_rows_own_text(shared_policy: Policy, rollout: Rollout):
    algorithm = build(shared_policy, "shaped")
    batch = drawn(algorithm, shared_policy, algorithm.prepare(rollout))
    received: list[tuple[torch.Tensor, ...]] = []
    algorithm.networks()["critic"].register_forward_pre_hook(lambda module, inputs: received.append(inputs))
    batch, _ = compared(algorithm, shared_policy, batch, Cut(12))
    algorithm.loss(shared_policy, batch)
    algorithm.auxiliary_loss(shared_policy, batch)
    own = torch.stack([shared_policy.text_summary(shared_policy.encode([p]))[0] for p in batch.prompts])
    assert len(received) == 3
    for x, sigma, summary in received:
        assert torch.equal(x, sight(batch).x)
        assert torch.equal(sigma, batch.noise_sigma)
        assert torch.allclose(summary, own, atol=1e-6)
    assert len(own.unique(dim=0)) == 3


def test_the_networks_text_is_a_gain_around_one_and_none_of_it_leaves_the_image():
    critic, x = StateCritic(4, 6), torch.randn(2, 4, 8, 8)
    torch.nn.init.zeros_(critic.gain.weight)
    torch.nn.init.zeros_(critic.gain.bias)
    torch.nn.init.normal_(critic.head[-1].weight)
    seen: list[torch.Tensor] = []
    critic.head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        critic(x, torch.full((2,), 0.5), torch.zeros(2, 6))
        features = torch.nn.functional.silu(critic.conv(x)).flatten(1)
    torch.testing.assert_close(seen[0][:, : features.shape[1]], features)


def test_the_critic_that_sees_receives_the_base_models_estimate_and_each_rows_own_text(
    make_policy: Callable[..., Policy], rollout: Rollout
):
    policy = make_policy()
    for p in policy.trainable_parameters():
        p.data += 0.05
    algorithm = build(policy, "sees")
    batch = drawn(algorithm, policy, algorithm.prepare(rollout))
    compared(algorithm, policy, batch, Cut(5))
    seen = [torch.cat(parts) for parts in zip(*algorithm.critics["value"]._seen, strict=True)]
    summary, text, sigma, target, group = seen
    rows = sight(batch)
    x0_hat = predict_x0(rows.x, policy.velocity(rows.x, rows.sigma, rows.cond, weights="reference"), rows.sigma)
    channels = rows.x.shape[1]
    assert torch.allclose(summary[:, :channels], rows.x.mean((2, 3)), atol=1e-5)
    assert torch.allclose(summary[:, channels : 2 * channels], x0_hat.mean((2, 3)), atol=1e-4)
    own = torch.stack([policy.text_summary(policy.encode([p]))[0] for p in batch.prompts])
    assert torch.allclose(text, own, atol=1e-6)
    assert torch.equal(sigma, batch.noise_sigma)
    assert torch.equal(target, batch.advantage)
    assert torch.equal(group, batch.group)


def test_the_preview_scores_the_decoded_estimate_of_the_current_model_with_each_rows_own_prompt(
    make_policy: Callable[..., Policy], rollout: Rollout
):
    policy = make_policy()
    for p in policy.trainable_parameters():
        p.data += 0.01
    algorithm = build(policy, "preview")
    batch = drawn(algorithm, policy, algorithm.prepare(rollout))
    rows = sight(batch)
    with torch.no_grad():
        x0_hat = predict_x0(rows.x, policy.velocity(rows.x, rows.sigma, rows.cond), rows.sigma)
        expected = brightness(policy.decode(x0_hat), batch.prompts)
    assert torch.allclose(values(algorithm, policy, batch), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_goes_with_its_row(shared_policy: Policy, rollout: Rollout, kind: str):
    algorithm, batch = taught(shared_policy, kind, rollout)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    shuffled = values(algorithm, shared_policy, batch.select(order))
    torch.testing.assert_close(shuffled, values(algorithm, shared_policy, batch)[order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_another_text_gives_another_value(shared_policy: Policy, rollout: Rollout, kind: str):
    algorithm, batch = taught(shared_policy, kind, rollout)
    texts = batch.prompts[4:] + batch.prompts[:4]
    retold = replace(batch, prompts=texts, cond=shared_policy.encode(texts))
    difference = values(algorithm, shared_policy, retold) - values(algorithm, shared_policy, batch)
    assert difference.abs().min() > 1e-6


# --- when they learn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sees", "preview"])
def test_a_critic_that_sees_judges_a_row_before_it_learns_from_its_reward(
    shared_policy: Policy, rollout: Rollout, kind: str
):
    algorithm = build(shared_policy, kind)
    batch = drawn(algorithm, shared_policy, algorithm.prepare(rollout))
    critic = algorithm.critics["value"]

    def judged(rows: Batch) -> torch.Tensor:
        return critic.judge(values(algorithm, shared_policy, rows), rows.noise_sigma, rows.group)

    assert not judged(batch).any()
    algorithm.after_iteration(shared_policy)
    first = judged(batch)
    assert first.any()
    assert torch.equal(judged(replace(batch, advantage=-batch.advantage)), first)
    algorithm.after_iteration(shared_policy)
    assert not torch.equal(judged(batch), first)


def test_least_squares_find_a_reward_that_is_linear_in_the_estimate(shared_policy: Policy):
    """48 prompts of 8 rows: what is learned from the first half holds for the second, prompts' means taken out."""
    critic, generator = LeastSquaresCritic(torch.device("cpu"), center=True), torch.Generator().manual_seed(0)

    def rows(first: int) -> Sight:
        prompts = tuple(f"{n} crosses" for n in range(first, first + 24) for _ in range(8))
        group = torch.arange(24).repeat_interleave(8)
        x = torch.randn(192, *shared_policy.latent_shape, generator=generator)
        x *= 1 + 2 * torch.rand(192, 1, 1, 1, generator=generator)
        target = x.square().mean((1, 2, 3)) + group  # the level of a prompt is taken out
        sigma = torch.full((192,), 0.4)
        return Sight(x, sigma, shared_policy.encode(prompts), prompts, centered_within(target, group), group)

    for part in range(3):
        judged = rows(24 * part)
        with torch.no_grad():
            value = critic.judge(critic.measure(shared_policy, judged, brightness), judged.sigma, judged.group)
        critic.learn()
    assert (value - judged.target).var() < 0.25 * judged.target.var()
    assert centered_within(value, judged.group).sub(value).abs().max() < 1e-5


def test_the_previews_slope_is_that_of_least_squares_in_its_range_of_sigma(shared_policy: Policy):
    critic = PreviewCritic()
    preview, group = torch.tensor([1.0, 3.0, 2.0, 6.0, 1.0, 2.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    sigma = torch.tensor([0.5, 0.51, 0.52, 0.53, 0.9, 0.9])
    target = torch.tensor([-0.5, 0.5, 1.0, -1.0, 3.0, -3.0])
    critic._seen.append((preview, target, sigma, group))
    critic.learn()
    # Centred previews -1, 1 and -2, 2: (0.5 + 0.5 - 2 - 2) / (1 + 1 + 4 + 4); then -0.5, 0.5: (-1.5 - 1.5) / 0.5.
    value = critic.judge(preview, sigma, group)
    assert value.tolist() == pytest.approx([0.3, -0.3, 0.6, -0.6, 3.0, -3.0])
    assert not critic.judge(preview, torch.full((6,), 0.2), group).any()


@pytest.mark.parametrize("kind", ["sees", "preview"])
def test_what_a_critic_that_sees_has_learned_survives_a_checkpoint(
    shared_policy: Policy, rollout: Rollout, kind: str, tmp_path: Path
):
    algorithm, batch = taught(shared_policy, kind, rollout)
    save_state(tmp_path / "state.safetensors", algorithm.state_dict())
    other = build(shared_policy, kind)
    other.load_state_dict(load_state(tmp_path / "state.safetensors"))
    for one, two in zip(
        minibatch_loss(algorithm, shared_policy, batch).metrics.values(),
        minibatch_loss(other, shared_policy, batch).metrics.values(),
        strict=True,
    ):
        assert torch.equal(one, two)


def test_every_further_step_of_the_critic_has_a_gradient_of_its_own(
    tmp_path: Path, tiny_config: TinyConfig, make_trainer: MakeTrainer
):
    settings = {"algorithm.critic": "shaped", "algorithm.warmup": 0, "training.auxiliary_steps": 3}
    trainer = make_trainer(tiny_config("acflow", overrides={**settings, "training.images": 32}), tmp_path)
    optimizer, norms = trainer.updater.auxiliary_optimizer, []
    assert optimizer is not None
    step = optimizer.step

    def noted() -> None:
        norms.append(sum(p.grad.square().sum().item() for p in trainer.updater.auxiliary_parameters))
        step()

    optimizer.step = noted  # type: ignore[method-assign]
    trainer.run()
    assert len(norms) == 3 * 32 // 8
    assert min(norms) > 1e-12
    assert len(set(norms)) == len(norms)


# --- what they cost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({"algorithm.critic": "sees"}, 0),
        ({"algorithm.critic": "preview"}, 16),
        ({"algorithm.critic": "none", "algorithm.log_preview": True}, 16),
        ({"algorithm.critic": "preview", "algorithm.log_preview": True}, 32),
    ],
)
def test_the_reward_calls_of_a_preview_are_on_the_budget(
    tmp_path: Path, tiny_config: TinyConfig, make_trainer: MakeTrainer, settings: dict[str, Any], extra: int
):
    brief = {"algorithm.warmup": 1, "training.prompts_per_iteration": 2, "training.images": 16}
    trainer = make_trainer(tiny_config("acflow", overrides={**settings, **brief}), tmp_path)
    trainer.run()
    assert trainer.budget.reward_calls == 16 + extra
    assert trainer.budget.images == 16


@pytest.mark.parametrize("kind", ["sees", "preview"])
def test_the_gradient_is_the_same_whatever_the_microbatch_with_a_critic_that_sees(
    tmp_path: Path, tiny_config: TinyConfig, make_trainer: MakeTrainer, kind: str
):
    settings = {"algorithm.critic": kind, "algorithm.shaping": "normalize", "algorithm.warmup": 1}
    settings |= {"training.prompts_per_iteration": 2, "training.images": 16}
    trainer = make_trainer(tiny_config("acflow", overrides=settings), tmp_path)
    trainer.run()
    batch = trainer.algorithm.prepare(trainer.collector.collect(2, trainer.budget))
    batch = drawn(trainer.algorithm, trainer.policy, batch)
    gradients = []
    for microbatch in (None, 3, 1):
        trainer.updater.optimizer.zero_grad()
        trainer.updater.gradient(batch, microbatch)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.updater.parameters]))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def test_in_the_warm_up_a_critic_without_a_gradient_learns_and_the_policy_does_not(
    tmp_path: Path, tiny_config: TinyConfig, make_trainer: MakeTrainer
):
    settings = {"algorithm.critic": "sees", "algorithm.warmup": 9, "training.images": 160}
    trainer = make_trainer(tiny_config("acflow", overrides=settings), tmp_path)
    trainer.iterations = 2
    start = copy.deepcopy(trainer.updater.parameters)
    trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(trainer.updater.parameters, start, strict=True))
    assert trainer.algorithm.critics["value"].state_dict()["w"].any()


# --- what is logged ---------------------------------------------------------------------------------------------------


def test_explained_variance_is_told_by_the_range_of_sigma_and_only_of_enough_rows():
    sigma = torch.tensor([0.1] * 8 + [0.5] * 8 + [0.8] * 8 + [0.9] * 7)
    target = 3 + torch.randn(31, generator=torch.Generator().manual_seed(0))
    value = torch.where(sigma == 0.5, target - 2, torch.ones(31))  # a constant beside it explains no less
    explained = {name: v.item() for name, v in explained_by_sigma(value, target, sigma).items()}
    expected = {"explained_variance_0.00": 0.0, "explained_variance_0.33": 1.0, "explained_variance_0.66": 0.0}
    assert explained == pytest.approx(expected, abs=1e-6)


def test_what_is_explained_within_prompts_leaves_out_their_levels():
    group = torch.tensor([0, 0, 1, 1])
    target, sigma = torch.tensor([10.0, 12.0, -3.0, -7.0]), torch.tensor([0.4, 0.4, 0.7, 0.7])
    levels, half = torch.tensor([11.0, 11.0, -5.0, -5.0]), torch.tensor([0.0, 1.0, 0.0, -2.0])
    errors = errors_within_prompts({"levels": levels, "half": half}, target, sigma, group)
    assert {name: v.item() for name, v in errors.items()} == pytest.approx(
        {
            "within_prompt_variance_0.33": 1.0,
            "within_prompt_error_levels_0.33": 1.0,
            "within_prompt_error_half_0.33": 0.25,
            "within_prompt_variance_0.66": 4.0,
            "within_prompt_error_levels_0.66": 4.0,
            "within_prompt_error_half_0.66": 1.0,
        }
    )


def test_an_unknown_model_without_hidden_states_is_seen_by_its_estimate_alone(make_policy: Callable[..., Policy]):
    policy = make_policy()
    policy.family.last_norm = lambda module: None  # type: ignore[method-assign]
    x, sigma, cond = policy.draw_noise(2), torch.tensor([0.3, 0.8]), policy.encode(PROMPTS[:2])
    _, hidden = policy.velocity_and_hidden(x, sigma, cond)
    assert hidden is None
    rows = Sight(x, sigma, cond, PROMPTS[:2], torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    critic = make_critic("sees", policy, 64, center=False)
    assert torch.equal(critic.measure(policy, rows, brightness), torch.zeros(2))
    critic.learn()


@pytest.mark.parametrize("weights", ["current", "reference"])
def test_hidden_states_are_what_the_velocity_is_a_linear_function_of(make_policy: Callable[..., Policy], weights: str):
    policy = make_policy()
    for p in policy.trainable_parameters():
        p.data += 0.01
    x, sigma, cond = policy.draw_noise(2), torch.tensor([0.3, 0.8]), policy.encode(PROMPTS[:2])
    v, hidden = policy.velocity_and_hidden(x, sigma, cond, weights)
    assert torch.equal(v, policy.velocity(x, sigma, cond, weights))
    assert hidden is not None
    with policy.views.use(weights) as module:
        patches = module.proj_out(hidden)
    side, channels = x.shape[2] // 2, x.shape[1]
    expected = patches.view(2, side, side, 2, 2, channels).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
    assert torch.allclose(v, expected, atol=1e-4)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_literal_configuration_of_the_page_runs_and_has_none_of_flowbenchs_own_devices(
    tmp_path: Path, tiny_config: TinyConfig, make_trainer: MakeTrainer
):
    found = re.search(r"```yaml\n# literal\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    page = yaml.safe_load(found[1])
    settings = {f"{section}.{key}": value for section, values in page.items() for key, value in values.items()}
    config = AcFlow.Config.model_validate(page["algorithm"])
    assert (config.center, config.control_variate, config.w2_every) == (False, False, 1)
    assert page["training"] == {"shared_noise": False, "anchor_decay": None}
    assert config.critic == "shaped"
    assert config.warmup > 0
    assert config.clip is not None
    trainer = make_trainer(tiny_config("acflow", overrides={**settings, "algorithm.warmup": 1}), tmp_path)
    start = copy.deepcopy(trainer.updater.parameters)
    weights = []
    compare = trainer.algorithm.compare

    def noted(scalars: Any) -> Any:
        result = compare(scalars)
        weights.extend(result.scalars.get("weight", torch.zeros(0)).tolist())
        return result

    trainer.algorithm.compare = noted  # type: ignore[method-assign]
    trainer.run()
    assert len(weights) == 16
    assert min(weights) > 0  # positive, of a clipped advantage
    assert max(weights) <= torch.exp(torch.tensor(config.tau * config.clip)) + 1e-6
    assert any(not torch.equal(a, b) for a, b in zip(trainer.updater.parameters, start, strict=True))
