"""The simulated annotators, and a few steps of every embedded reward model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from transformers import CLIPTokenizer

from flowbench.builders import rewards as build
from flowbench.builders.data import draw_captions
from flowbench.builders.fit import step_generator
from flowbench.builders.hf_clip import clip_model, copy_clip
from flowbench.builders.preferences import (
    PER_PROMPT,
    TRAITS,
    Annotators,
    Pictures,
    draw_choices,
    fresh_pictures,
    make_pictures,
    population,
)
from flowbench.builders.reward_card import load_rewards, measure, score_pictures, write_reward_cards
from flowbench.models.policy import Policy
from flowbench.reward import checked_score
from flowbench.testbeds.shapes.weights import weights_folder

CPU = torch.device("cpu")


def silent(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def pictures(shared_policy: Policy) -> Pictures:
    rng = np.random.default_rng(0)
    return make_pictures(shared_policy, draw_captions(24, rng), rng, silent)


@pytest.fixture(scope="module")
def materials(pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> build.Materials:
    clip = open_clip.create_model(f"local-dir:{weights_folder() / 'mini-clip'}").eval()
    tokenizer = CLIPTokenizer.from_pretrained(weights_folder() / "mini-clip")
    return build.Materials(pictures, clip, tokenizer, tmp_path_factory.mktemp("work"), 0, CPU, silent)


def flat(utility: torch.Tensor) -> Pictures:
    """Pictures of one caption whose truth is given, and that are equal in all else."""
    k = len(utility)
    blank = torch.zeros(1, k, 3, 32, 32, dtype=torch.uint8)
    return Pictures(("a red circle",), blank, utility[None], torch.zeros(1, k), torch.zeros(1, k, len(TRAITS)))


def test_pictures_show_what_was_measured_of_them(pictures: Pictures):
    assert pictures.images.shape == (24, PER_PROMPT, 3, 32, 32)
    assert pictures.images.dtype == torch.uint8
    for values, low, high in [(pictures.truth, 0, 1), (pictures.clean, 0, 1), (pictures.traits, -1, 1)]:
        assert low <= values.min()
        assert values.max() <= high
    # scenes of the caption are truer than scenes of a wrong one, and than the base model's samples
    right, wrong, samples = pictures.truth[:, 0].mean(), pictures.truth[:, 1].mean(), pictures.truth[:, 3:].mean()
    assert right > 0.85
    assert right > wrong + 0.3
    assert right > samples


def test_choices_follow_bradley_and_terry():
    """A difference of utility of 1.5 is preferred with probability sigmoid(1.5)."""
    asked = flat(torch.tensor([0.0, 0.5]))
    choices = draw_choices(asked, Annotators(torch.zeros(len(TRAITS)), care=3.0), 40_000, step_generator(0, 0))
    better_first = choices.first == 1
    won = torch.where(better_first, choices.chosen, 1 - choices.chosen).mean().item()
    assert won == pytest.approx(torch.sigmoid(torch.tensor(1.5)).item(), abs=4 * 0.4 / 40_000**0.5)
    assert better_first.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (choices.first != choices.second).all()


def test_choices_are_a_function_of_their_generators_seed(pictures: Pictures):
    one, two, other = (draw_choices(pictures, population("hpsv2", 0), 50, step_generator(s, 3)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True))
    assert not torch.equal(one.row, other.row)


def test_populations_differ_in_taste_alone_and_one_sees_no_caption(pictures: Pictures):
    tastes = {name: population(name, 0) for name in build.NAMES}
    strengths = {name: p.taste.norm().item() for name, p in tastes.items()}
    assert strengths["hpsv2"] == pytest.approx(strengths["pickscore"]) == pytest.approx(strengths["imagereward"])
    assert not torch.allclose(tastes["hpsv2"].taste, tastes["pickscore"].taste, atol=0.3)
    blind = replace(pictures, truth=torch.rand(pictures.truth.shape))
    none, rows = torch.zeros(24, 1, len(TRAITS)), torch.arange(24)
    for name, sees in [("aesthetic", False), ("hpsv2", True)]:
        same = torch.equal(tastes[name].utilities(pictures, none, rows), tastes[name].utilities(blind, none, rows))
        assert same != sees


def test_clips_weights_in_transformers_classes_embed_the_same(materials: build.Materials, monkeypatch: Any):
    """With all layers kept, the whole network is the same function, normalisation of the pixels included."""
    monkeypatch.setattr("flowbench.builders.hf_clip.VISION_LAYERS", (0, 1, 2, 3))
    monkeypatch.setattr("flowbench.builders.hf_clip.TEXT_LAYERS", (0, 1, 2))
    model = clip_model(materials.tokenizer).eval()
    copy_clip(materials.clip, model)
    images, captions = materials.pictures.images[0].float() / 255, ["a red circle"] * PER_PROMPT
    with torch.no_grad():
        expected = build.open_clip_score(materials.clip, materials)(images, captions)
        assert torch.allclose(build.transformers_clip_score(model, materials)(images, captions), expected, atol=1e-3)


@pytest.mark.parametrize("name", build.NAMES)
def test_a_few_steps_write_what_the_reward_loads(
    name: str, materials: build.Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = replace(build.PLANS[name], steps=2, warmup=1)
    for stage in ("blip", "blip-whole"):
        monkeypatch.setitem(build.PLANS, stage, replace(build.PLANS[stage], steps=1))
    seen = []
    traced = replace(materials, work=tmp_path, progress=lambda *args: seen.append(args))
    build.TRAINERS[name](traced, tmp_path / f"mini-{name}", plan)
    assert [(stage, step, steps) for stage, step, steps, _ in seen if not stage.startswith("blip")] == [
        (name, 1, 2),
        (name, 2, 2),
    ]
    assert all(np.isfinite(loss) for *_, loss in seen)
    files = {f.name: f.stat().st_size for f in (tmp_path / f"mini-{name}").iterdir()}
    assert sum(files.values()) < {"hpsv2": 1.9e6, "pickscore": 1.4e6, "imagereward": 1.5e6, "aesthetic": 2e4}[name]
    rewards = {
        "hpsv2": lambda f: _class("hpsv2", "HpsV2")(model=str(f)),
        "imagereward": lambda f: _class("imagereward", "ImageReward")(str(f)),
        "pickscore": lambda f: _class("pickscore", "PickScore")(str(f)),
        "aesthetic": lambda f: _class("aesthetic", "Aesthetic")(str(weights_folder() / "mini-clip"), None, str(f)),
    }
    reward = rewards[name](tmp_path / f"mini-{name}")
    reward.load(CPU)
    images = materials.pictures.images[0].float() / 255
    scores = checked_score(reward, images, (materials.pictures.captions[0],) * PER_PROMPT)
    assert scores.std() > 0


def _class(module: str, name: str) -> Any:
    import importlib

    return getattr(importlib.import_module(f"flowbench.rewards.{module}"), name)


def test_a_stage_is_resumed_and_gives_the_same_weights(materials: build.Materials, tmp_path: Path):
    plan = replace(build.PLANS["aesthetic"], steps=30, checkpoint_every=10)

    def train(work: Path, stop_at: int | None = None) -> bytes:
        def progress(stage: str, step: int, steps: int, loss: float) -> None:
            if step == stop_at:
                raise KeyboardInterrupt

        work.mkdir(exist_ok=True)
        build.train_aesthetic(replace(materials, work=work, progress=progress), work / "out", plan)
        (file,) = (work / "out").iterdir()
        return file.read_bytes()

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stop_at=17)
    assert train(tmp_path / "parts") == whole


def test_learning_from_choices_finds_what_annotators_prefer(materials: build.Materials, tmp_path: Path):
    """A scorer with nothing but five weights of the traits learns the sign and the order of a population's tastes."""
    pictures, annotators = materials.shown("hpsv2"), population("hpsv2", 0)
    weights = torch.nn.Parameter(torch.zeros(len(TRAITS)))
    optimizer = torch.optim.Adam([weights], lr=0.1)
    plain = replace(annotators, care=0.0, polish=0.0)
    for step in range(150):
        choices = draw_choices(pictures, plain, 256, step_generator(0, step))
        first, second = (pictures.traits[choices.row, k] @ weights for k in (choices.first, choices.second))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(first - second, choices.chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cosine = torch.nn.functional.cosine_similarity(weights.detach(), annotators.taste, dim=0)
    assert cosine > 0.8


def test_the_measures_know_the_truth_and_a_coin(pictures: Pictures):
    noise = torch.randn(pictures.truth.shape, generator=torch.Generator().manual_seed(0))
    scores = {"clip": pictures.truth, "hpsv2": pictures.truth, "pickscore": noise, "aesthetic": pictures.clean}
    result = measure(scores, pictures, seed=0)
    assert result["hpsv2"]["accuracy against the oracle"] == 1.0
    assert result["hpsv2"]["agreement with clip"] == 1.0
    assert result["hpsv2"]["accuracy on choices of fresh annotators"] > 0.75
    assert result["pickscore"]["accuracy on choices of fresh annotators"] == pytest.approx(0.5, abs=0.1)
    assert "accuracy on choices of fresh annotators" not in result["clip"]


@pytest.mark.slow
def test_every_card_is_written(
    shared_policy: Policy, materials: build.Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from flowbench.prompts import load_split

    for stage in ("blip", "blip-whole"):
        monkeypatch.setitem(build.PLANS, stage, replace(build.PLANS[stage], steps=1))
    for name, train in build.TRAINERS.items():
        train(replace(materials, work=tmp_path), tmp_path / f"mini-{name}", replace(build.PLANS[name], steps=2))
    fresh = fresh_pictures(shared_policy, load_split("shapes", "test"), tmp_path, 0, silent)
    write_reward_cards(tmp_path, weights_folder() / "mini-clip", fresh, 0)
    for name in build.NAMES:
        assert "accuracy on choices of fresh annotators" in (tmp_path / f"mini-{name}" / "README.md").read_text()
    rewards = load_rewards(tmp_path, weights_folder() / "mini-clip")
    assert score_pictures(rewards["hpsv2"], fresh).shape == fresh.truth.shape
