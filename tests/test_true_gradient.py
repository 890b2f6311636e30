"""The true gradient on a model of images: what it is, and how it is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.errors import RunError, UsageError
from flowbench.experiments.probe import probe_configs
from flowbench.experiments.true_gradient import (
    Identity,
    SamplingPath,
    TrueGradient,
    identify,
    true_gradient,
)
from flowbench.models.policy import Policy, Tuning
from flowbench.prompts import PromptSplit, load_split
from flowbench.reward import Reward, register_reward

MakePolicy = Callable[..., Policy]


class Red:
    """A reward with gradient that keeps its scores: the mean of the red channel, twice that for some prompts."""

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        score = images[:, 0].mean((1, 2)) * torch.tensor([1.0 + len(p) % 2 for p in prompts])
        self.scores.append(score.detach())
        return score


@pytest.fixture
def reward(clean_registry: None) -> Any:
    decorate = register_reward("red", source="tests", licence="none", range=(0.0, 2.0), differentiable=True)
    return decorate(type("Red", (Red, Reward), {}))()


@pytest.fixture(scope="session")
def prompts() -> PromptSplit:
    split = load_split("shapes", "train")
    return replace(split, prompts=split.prompts[:6])


def request(policy: Policy, reward: Reward, prompts: PromptSplit, images: int = 16, seed: int = 0) -> Identity:
    path = SamplingPath("ode", tuple(policy.sigmas(3).tolist()), 0.7, 1.0)
    return identify(policy, reward, prompts, path, images, 2, seed)


def found(policy: Policy, reward: Reward, prompts: PromptSplit, cache: Path, **options: Any) -> TrueGradient:
    identity = request(policy, reward, prompts)
    return true_gradient(policy, reward, prompts, identity, cache, **options)


def test_the_true_gradient_is_the_slope_of_the_mean_reward_along_any_direction(
    make_policy: MakePolicy, reward: Any, prompts: PromptSplit, tmp_path: Path
):
    """Against differences with the same prompts and noise, along the gradient itself and along a random direction."""
    policy = make_policy()
    truth = torch.stack(found(policy, reward, prompts, tmp_path).parts).mean(0)
    parameters = policy.trainable_parameters()
    sizes, before = [p.numel() for p in parameters], [p.data.clone() for p in parameters]
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))

    def value() -> float:
        reward.scores.clear()
        true_gradient(policy, reward, prompts, request(policy, reward, prompts), tmp_path / "differences")
        return torch.cat(reward.scores).mean().item()

    for direction, tolerance in ((truth, 0.02), (truth / truth.norm() + 0.5 * noise / noise.norm(), 0.05)):
        unit, ends = direction / direction.norm(), []
        h = 1e-4  # a few images near a tipping point bend the mean reward sharply
        for shift in (h, -h):
            for p, start, part in zip(parameters, before, unit.split(sizes), strict=True):
                p.data = start + shift * part.view_as(p)
            ends.append(value())
        for p, start in zip(parameters, before, strict=True):
            p.data = start
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx((truth @ unit).item(), rel=tolerance)


def test_memory_saved_by_microbatches_or_recomputed_steps_does_not_change_it(
    make_policy: MakePolicy, reward: Any, prompts: PromptSplit, tmp_path: Path
):
    policy = make_policy()
    plain = found(policy, reward, prompts, tmp_path / "a")
    for name, options in {"b": {"microbatch": 8}, "c": {"recompute": True}}.items():
        other = found(policy, reward, prompts, tmp_path / name, **options)
        for one, two in zip(plain.parts, other.parts, strict=True):
            assert torch.allclose(one, two, rtol=1e-3, atol=1e-6 * one.norm())


def test_it_is_computed_once_and_read_for_the_same_weights_reward_prompts_and_seed_alone(
    make_policy: MakePolicy, reward: Any, prompts: PromptSplit, tmp_path: Path
):
    policy = make_policy()
    first = found(policy, reward, prompts, tmp_path)
    calls = len(reward.scores)
    again = found(policy, reward, prompts, tmp_path)
    assert (first.reused, again.reused) == (False, True)
    assert len(reward.scores) == calls
    assert all(torch.equal(a, b) for a, b in zip(first.parts, again.parts, strict=True))
    assert not torch.equal(*first.parts)  # independent halves
    identity = request(policy, reward, prompts)
    keys = {identity.key(), *(request(policy, reward, prompts, **x).key() for x in ({"images": 32}, {"seed": 1}))}
    keys.add(replace(identity, reward="other").key())
    keys.add(replace(identity, prompts="other").key())
    keys.add(replace(identity, path=replace(identity.path, guidance_scale=4.0)).key())
    policy.trainable_parameters()[0].data += 0.01
    keys.add(request(policy, reward, prompts).key())
    assert len(keys) == 7
    assert replace(identity, path=replace(identity.path, eta=0.1)).key() == identity.key()  # an ODE has no noise level


def test_a_file_of_other_weights_is_refused(make_policy: MakePolicy, reward: Any, prompts: PromptSplit, tmp_path: Path):
    policy = make_policy()
    identity = request(policy, reward, prompts)
    true_gradient(policy, reward, prompts, identity, tmp_path)
    policy.trainable_parameters()[0].data += 0.01
    changed = request(policy, reward, prompts)
    (tmp_path / f"{identity.key()}.safetensors").rename(tmp_path / f"{changed.key()}.safetensors")
    with pytest.raises(RunError, match="delete it"):
        true_gradient(policy, reward, prompts, changed, tmp_path)


def test_with_lora_it_lies_in_the_adapters_parameters_under_a_key_of_its_own(
    make_policy: MakePolicy, reward: Any, prompts: PromptSplit, tmp_path: Path
):
    full, lora = make_policy(), make_policy(Tuning("lora", 4, 8.0))
    assert request(full, reward, prompts).key() != request(lora, reward, prompts).key()
    truth = found(lora, reward, prompts, tmp_path)
    parameters = lora.trainable_parameters()
    assert len(truth.parts[0]) == sum(p.numel() for p in parameters)
    slopes = truth.parts[0].split([p.numel() for p in parameters])
    still = [bool((slope == 0).all()) for slope in slopes]
    assert all(still[::2])  # with B = 0, A has no gradient,
    assert not all(still[1::2])  # and B has one


def test_a_reward_without_gradient_is_refused_with_the_remedy(preset_file: str):
    for name in ("jpeg", "clip:0.5+jpeg:0.5"):
        with pytest.raises(UsageError, match=r"reward 'jpeg' has none, use for example 'clip'"):
            probe_configs(["raft"], name, preset_file, None, 0, "cpu", {})
