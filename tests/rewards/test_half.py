"""Rewards that are moved between devices, and those whose scores allow half precision."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from tiny import SIDE, loaded, smooth_images

from flowbench.evaluation.judges import build_reward
from flowbench.models.presets import load_preset
from flowbench.reward import Reward, checked_score
from flowbench.rewards.clip import Clip
from flowbench.scoring.visitor import Visitor, movable

CPU, META = torch.device("cpu"), torch.device("meta")
PROMPTS = ("a red circle", "a photo of a cat", "on the left", "a dog on the left")
IMAGES = torch.cat([smooth_images(4, 40, 60), smooth_images(4, SIDE, SIDE).repeat(1, 1, 2, 3)[:, :, :40, :60]])


NAMES = ["clip", "hpsv2", "imagereward", "pickscore", "aesthetic"]


@pytest.fixture(params=[*NAMES, *(f"mini-{name}" for name in NAMES)])
def halvable(request: pytest.FixtureRequest, clip_folder) -> Reward:
    """Each reward that states a tolerance: the real architecture, small, with random and with trained weights."""
    if request.param.startswith("mini-"):
        return build_reward(request.param.removeprefix("mini-"), load_preset("mini-sd3"), CPU)
    if request.param == "clip":
        return loaded(Clip(str(clip_folder)))
    found = copy.deepcopy(request.getfixturevalue(request.param))
    generator = torch.Generator().manual_seed(0)
    for p in (p for network in found.networks() for p in network.parameters()):
        if 0 < p.abs().max() < 1e-4:  # BLIP's embeddings as transformers draws them are nothing in float16
            p.data = 0.5 * torch.randn(p.shape, generator=generator)
    return found


@torch.no_grad()
def test_scores_in_half_precision_differ_by_no_more_than_the_reward_states(halvable: Reward):
    exact = checked_score(halvable, IMAGES, PROMPTS * 2)
    identity = halvable.provenance()
    halvable.halve()
    halved = checked_score(halvable, IMAGES, PROMPTS * 2)
    difference = (halved - exact).abs().max().item()
    print(f"{halvable.info.name}: {difference:.2g} of a deviation of {exact.std():.2g}")
    assert 0 < difference <= halvable.half_tolerance
    assert exact.std().item() > 5 * difference  # so that the tolerance says something
    assert halvable.provenance() == {**identity, "precision": "float16"}


def test_vqa_stays_in_float32(vqa: Reward):
    assert vqa.half_tolerance is None


def test_a_reward_of_networks_moves_with_all_its_tensors(reward: Reward):
    reward = copy.deepcopy(reward)
    assert movable(reward)
    reward.to(META)
    assert {p.device for network in reward.networks() for p in network.parameters()} == {META}
    assert reward.towers.device == META if hasattr(reward, "towers") else reward.device == META


class Counted(Clip):
    made = 0

    def load(self, device: torch.device) -> None:
        type(self).made += 1
        super().load(device)


@pytest.fixture
def visitor(clip_folder) -> Visitor:
    Counted.made = 0

    def make(device: torch.device) -> Reward:
        reward = Counted(str(clip_folder))
        reward.load(device)
        return reward

    return Visitor(make, CPU)


@torch.no_grad()
def test_a_visitor_scores_as_the_reward_does_and_is_known_while_it_is_away(visitor: Visitor, clip_folder):
    plain = loaded(Clip(str(clip_folder)))
    expected = checked_score(plain, IMAGES, PROMPTS * 2)
    for leave in (visitor.rest, visitor.leave):
        assert torch.equal(checked_score(visitor, IMAGES, PROMPTS * 2), expected)
        leave()
        assert visitor.provenance() == plain.provenance()
    assert visitor.reward is None
    assert Counted.made == 1
    assert torch.equal(checked_score(visitor, IMAGES, PROMPTS * 2), expected)
    assert Counted.made == 2


def test_a_visitor_is_on_the_device_only_from_its_first_score_until_it_rests(visitor: Visitor):
    moves = []
    visitor.device = META
    visitor.reward.to = lambda device: moves.append(device.type)
    for _ in range(2):
        visitor.score(IMAGES[:1], PROMPTS[:1])
    assert moves == ["meta"]
    visitor.rest()
    visitor.rest()
    assert moves == ["meta", "cpu"]


def test_a_reward_that_cannot_be_moved_is_loaded_on_the_device_and_dropped(clip_folder):
    class Fixed(Reward):
        info = Clip.info
        places: ClassVar[list[str]] = []

        def load(self, device: torch.device) -> None:
            self.places.append(device.type)

        def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
            return images.mean((1, 2, 3))

    def make(device: torch.device) -> Reward:
        reward = Fixed()
        reward.load(device)
        return reward

    visitor = Visitor(make, META)
    visitor.score(IMAGES[:1], PROMPTS[:1])
    visitor.score(IMAGES[:1], PROMPTS[:1])
    assert Fixed.places == ["cpu", "meta"]
    visitor.rest()
    assert visitor.reward is None
