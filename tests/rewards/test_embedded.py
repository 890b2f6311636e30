"""The preference models that are shipped for mini-sd3: imperfect judges of the world of shapes, within their size."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from flowbench.builders.clip import contrastive_batch
from flowbench.builders.data import draw_images
from flowbench.config import resolve_config
from flowbench.evaluation.judges import build_judges, build_reward
from flowbench.models.presets import load_preset
from flowbench.testbeds.shapes.weights import embedded_models, weights_folder

CPU = torch.device("cpu")
PRESET = load_preset("mini-sd3")
JUDGES = [name for name in PRESET.rewards if name != "clip"]


def test_embedded_weights_stay_below_25_megabytes():
    assert sum(f.stat().st_size for f in weights_folder().rglob("*") if f.is_file()) <= 25e6


def test_every_preference_model_is_a_default_judge_of_a_run_on_clip():
    config = resolve_config("acflow", "clip", "mini-sd3", overrides={})
    judges = build_judges(config, build_reward("clip", PRESET, CPU), PRESET, CPU)
    assert judges.held_out == tuple(JUDGES)
    assert {f"mini-{name}" for name in JUDGES} <= set(embedded_models())


@pytest.mark.parametrize("name", JUDGES)
def test_they_agree_with_fresh_annotators_often_but_not_always(name: str):
    card = json.loads((weights_folder() / f"mini-{name}" / "scores.json").read_text(encoding="utf-8"))
    assert 0.75 <= card["accuracy on choices of fresh annotators"] <= 0.92


@pytest.mark.parametrize("name", [n for n in JUDGES if n != "aesthetic"])
def test_they_prefer_the_scene_of_a_caption_to_one_with_a_wrong_attribute(name: str):
    rng = np.random.default_rng(3)
    _, captions, wrong = contrastive_batch(128, rng)
    texts, reward = tuple(c.text for c in captions), build_reward(name, PRESET, CPU)
    with torch.no_grad():
        good, bad = (reward.score(draw_images(scenes, rng), texts) for scenes in (captions, wrong))
    assert (good > bad).float().mean() > 0.75
