"""What stands in for weights while no gradient reaches them: faster, as good as equal, and gone without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from tiny_pipelines import SIDE, sd3, zimage

from flowbench.config import RunConfig
from flowbench.errors import UsageError
from flowbench.models.flow import SAMPLERS
from flowbench.models.policy import Policy, Samples, Tuning
from flowbench.models.presets import load_preset
from flowbench.training.trainer import Trainer

MakePolicy = Callable[..., Policy]
LORA = Tuning("lora", lora_rank=4, lora_alpha=8.0)
PROMPTS = ("a photo of a red bench", "a photo of two cats", "a photo of a red bench")
SDE = SAMPLERS["flow-sde"]


@pytest.fixture(scope="module")
def tiny_sd3() -> Any:
    return sd3()


def moved(policy: Policy, seed: int = 3) -> Policy:
    generator = torch.Generator().manual_seed(seed)
    for p in policy.trainable_parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return policy


def tiny(pipeline: Any, dtype: torch.dtype, tuning: Tuning = LORA) -> Policy:
    """A policy of tiny SD3 in that precision, its trained weights moved."""
    pipeline = copy.deepcopy(pipeline)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
    preset = load_preset("sd3-medium").model_copy(update={"resolution": SIDE, "max_sequence_length": 24})
    torch.manual_seed(0)
    return moved(Policy(pipeline, preset, tuning, sampler="flow-sde", num_steps=3, guidance_scale=1.0))


def drawn(policy: Policy, **options: Any) -> Samples:
    policy.generator.manual_seed(5)
    options = {"sampler": SDE, "num_steps": 3, "guidance_scale": 1.0, "keep_states": True, **options}
    return policy.rollout(policy.encode(PROMPTS), policy.draw_noise(3), **options)


def log_ratio(policy: Policy, samples: Samples) -> torch.Tensor:
    """log rho of each step as a policy gradient computes it, at the weights that drew it, (B, T)."""
    assert samples.states is not None
    assert samples.log_prob is not None
    cond, ratios = policy.encode(PROMPTS), []
    for k in range(3):
        sigma, sigma_next = (samples.sigmas[i].expand(3) for i in (k, k + 1))
        step = policy.transition(samples.states[:, k], sigma, sigma_next, cond)
        ratios.append((SDE.log_prob(samples.states[:, k + 1], step) - samples.log_prob[:, k]) / samples.x0[0].numel())
    return torch.stack(ratios, 1)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_at_unchanged_weights_the_ratio_is_one(tiny_sd3: Any, dtype: torch.dtype) -> None:
    policy = tiny(tiny_sd3, dtype)
    ratios = log_ratio(policy, drawn(policy)).abs()
    assert ratios.max() < 1e-6  # clip ranges are 1e-4
    if dtype == torch.bfloat16:
        assert ratios.max() == 0


def test_a_rollout_merges_once_and_leaves_every_weight_as_it_was(make_policy: MakePolicy, monkeypatch: Any) -> None:
    policy = moved(make_policy(LORA))
    policy.add_view("old")
    before = [(p.data_ptr(), p.detach().clone(), p.requires_grad) for p in policy.transformer.parameters()]
    made, merges = policy.views._make_stand_in, list[str]()
    monkeypatch.setattr(policy.views, "_make_stand_in", lambda name: merges.append(name) or made(name))
    first = drawn(policy)
    assert merges == ["current"]
    after = [(p.data_ptr(), p, p.requires_grad) for p in policy.transformer.parameters()]
    assert all(
        a == c and b.dtype == d.dtype and torch.equal(b, d) and e == f
        for (a, b, e), (c, d, f) in zip(before, after, strict=True)
    )
    moved(policy)  # by way of .data, which leaves no trace
    assert (drawn(policy).x0 - first.x0).abs().max() > 1e-3


def test_a_view_is_merged_again_when_its_weights_moved_and_not_else(make_policy: MakePolicy, monkeypatch: Any) -> None:
    policy = moved(make_policy(LORA))
    policy.add_view("old")
    made, merges = policy.views._make_stand_in, list[str]()
    monkeypatch.setattr(policy.views, "_make_stand_in", lambda name: merges.append(name) or made(name))
    x, sigma, cond = policy.draw_noise(3), torch.full((3,), 0.5), policy.encode(PROMPTS)
    first = [policy.velocity(x, sigma, cond, "old") for _ in range(2)]
    assert torch.equal(*first)
    assert merges == ["old"]
    with torch.no_grad():
        torch.testing.assert_close(first[0], policy.velocity(x, sigma, cond), rtol=1e-5, atol=1e-5)
    moved(policy)
    policy.update_view("old", decay=0.0)
    torch.testing.assert_close(policy.velocity(x, sigma, cond, "old"), policy.velocity(x, sigma, cond).detach())
    assert merges == ["old", "old"]


def test_a_gradient_is_the_same_whatever_stood_in_between(make_policy: MakePolicy) -> None:
    gradients = []
    for other in (None, "old", "reference"):
        policy = moved(make_policy(LORA))
        policy.add_view("old")
        x, sigma, cond = policy.draw_noise(3), torch.full((3,), 0.5), policy.encode(PROMPTS)
        v = policy.velocity(x, sigma, cond)
        if other:
            policy.velocity(x, sigma, cond, other)
        v.square().sum().backward()
        gradients.append([p.grad for p in policy.trainable_parameters()])
    assert all(torch.equal(a, b) for found in gradients[1:] for a, b in zip(found, gradients[0], strict=True))


def test_a_small_change_is_not_lost_in_half_precision(tiny_sd3: Any) -> None:
    """Merged into bfloat16 weights it would be: it is less than half of their distance."""
    policy = tiny(tiny_sd3, torch.bfloat16)
    layer = policy.views._layers[0]  # type: ignore[attr-defined]
    for p in policy.trainable_parameters():
        p.data *= 0.03
    weight, delta = layer.get_base_layer().weight, layer.get_delta_weight("default")
    kept = ((weight + delta.to(weight.dtype)).float() - weight.float()).norm() / delta.norm()
    assert not 0.9 < kept < 1.1
    x, sigma, cond = policy.draw_noise(3), torch.full((3,), 0.5), policy.encode(PROMPTS)
    with policy.frozen("current"):
        standing = policy.velocity(x, sigma, cond)
    assert torch.equal(standing, policy.velocity(x, sigma, cond).detach())
    assert not torch.equal(standing, policy.velocity(x, sigma, cond, "reference"))


# --- precision of rollouts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [LORA, Tuning("full")], ids=["lora", "full"])
def test_half_precision_is_that_of_trainings_rollouts_and_images_alone(make_policy: MakePolicy, tuning: Tuning) -> None:
    policy = moved(make_policy(tuning, rollout_dtype=torch.bfloat16))
    before = [p.detach().clone() for p in policy.transformer.parameters()]
    ode = SAMPLERS["ode"]
    full = drawn(policy, sampler=ode)
    images = policy.decode(full.x0).detach()
    with policy.rollout_precision():
        half = drawn(policy, sampler=ode)
        with torch.no_grad():
            rough = policy.decode(full.x0)
        with_log_prob = drawn(policy)
    assert 1e-5 < (half.x0 - full.x0).square().mean().sqrt() < 0.1
    assert 1e-5 < (rough - images).abs().mean() < 0.01
    assert torch.equal(with_log_prob.x0, drawn(policy).x0)  # whose ratio would compare two precisions
    assert torch.equal(drawn(policy, sampler=ode).x0, full.x0)
    assert torch.equal(policy.decode(full.x0), images)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.transformer.parameters(), strict=True))


def test_a_trainer_asks_for_the_configured_precision(
    tmp_path: Path, tiny_config: Callable[..., RunConfig], make_trainer: Callable[..., Trainer]
) -> None:
    x0 = []
    for dtype in ("float32", "bfloat16"):
        config = tiny_config("raft", overrides={"training.rollout_dtype": dtype, "training.num_steps": 2})
        trainer = make_trainer(config, tmp_path / dtype)
        x0.append(trainer.collector.collect(0, trainer.budget).x0)
    assert 1e-5 < (x0[0] - x0[1]).square().mean().sqrt() < 0.1


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sd3, zimage], ids=["sd3", "zimage, whose texts differ in length"])
def test_guidance_in_one_call_is_that_in_two(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    name = "sd3-medium" if make is sd3 else "zimage"
    policy = guided(make, name)
    x, sigma, cond = policy.draw_noise(3), torch.tensor([0.2, 0.5, 0.9]), policy.encode(PROMPTS)
    found, evaluations = [], []
    for rows in (8, 0):
        monkeypatch.setattr("flowbench.models.velocities.BOTH_AT_ONCE", rows)
        before = policy.function_evaluations
        with torch.no_grad():
            found.append(policy.guided_velocity(x, sigma, cond, guidance_scale=3.0))
        evaluations.append(policy.function_evaluations - before)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert evaluations == [6, 6]
    assert (found[0] - policy.velocity(x, sigma, cond)).abs().max() > 1e-3


def guided(make: Callable[[], Any], name: str) -> Policy:
    update = {"resolution": SIDE, "max_sequence_length": 24}
    preset = load_preset("sd3-medium").model_copy(update=update | ({} if name == "sd3-medium" else {"family": name}))
    return Policy(make(), preset)


# --- compiling --------------------------------------------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces blocks, and guards what was traced, without a C++ compiler: seconds instead of a minute."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend="eager"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    torch._dynamo.reset()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("tuning", [LORA, Tuning("full")], ids=["lora", "full"])
def test_compiled_blocks_agree_with_plain_ones_in_every_view(make_policy: MakePolicy, tuning: Tuning) -> None:
    found = []
    for compile_blocks in (False, True):
        policy = moved(make_policy(tuning, compile_blocks=compile_blocks, gradient_checkpointing=True))
        policy.add_view("old")
        moved(policy)
        x, sigma, cond = policy.draw_noise(3), torch.tensor([0.2, 0.5, 0.9]), policy.encode(PROMPTS)
        v = policy.velocity(x, sigma, cond)
        others = [policy.velocity(x, sigma, cond, weights) for weights in ("reference", "old")]
        v.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None])
        found.append([drawn(policy, num_steps=2).x0, v.detach(), *others, gradient])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1.6e-4)
    assert not torch.equal(found[1][1], found[1][2])


@pytest.mark.usefixtures("traced")
def test_a_model_without_blocks_says_so_in_one_line() -> None:
    from flowbench.models.families import load_pipeline

    preset = load_preset("gaussian")
    with pytest.raises(UsageError, match=r"'gaussian' has no blocks to compile; use training.compile=false"):
        Policy(load_pipeline(preset, torch.device("cpu")), preset, compile_blocks=True)
    with pytest.raises(UsageError, match=r"use training.rollout_dtype=float32"):
        Policy(load_pipeline(preset, torch.device("cpu")), preset, rollout_dtype=torch.bfloat16)


def test_both_settings_are_in_the_hash_only_when_they_are_on(tiny_config: Callable[..., RunConfig]) -> None:
    plain = tiny_config().hash()
    assert tiny_config(overrides={"training.compile": False, "training.rollout_dtype": "float32"}).hash() == plain
    others = [{"training.compile": True}, {"training.rollout_dtype": "bfloat16"}]
    assert len({plain, *(tiny_config(overrides=o).hash() for o in others)}) == 3
