"""Budgets are met exactly, or refused with the nearest that can be; a warm-up leaves something of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from flowbench.config import resolve_config
from flowbench.errors import UsageError
from flowbench.experiments.api import resolve
from flowbench.models.presets import AnalyticPreset, load_preset
from flowbench.registry import algorithms

Main = Callable[..., int]
MODELS = ("mini-sd3", "sd3-medium", "sd3.5-medium", "sd3.5-large", "gaussian", "mixture")
GAUSSIAN = {"reward": "linear", "model": "gaussian"}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("algorithm", algorithms.names())
def test_every_default_budget_is_a_whole_number_of_iterations(algorithm: str, model: str):
    plane = isinstance(load_preset(model), AnalyticPreset)
    images = set()
    for reward in ("linear",) if plane else ("clip", "oracle"):
        if reward == "oracle" and (model != "mini-sd3" or "reward_grad" in algorithms.get(algorithm).info.needs):
            continue
        training = resolve_config(algorithm, reward, model, overrides={}).training
        assert training.iterations * training.images_per_iteration == training.images
        images.add((reward, training.images))
    preset = load_preset(model)
    assert ("linear" if plane else "clip", preset.training["images"]) in images  # the same for every algorithm


@pytest.mark.parametrize(
    ("images", "remedy"), [(7, "use 256$"), (256 + 1, "use 256 or 512$"), (12799, "use 12544 or 12800$")]
)
def test_a_budget_that_cannot_be_met_is_refused_with_the_nearest(images: int, remedy: str):
    with pytest.raises(UsageError, match=rf"training\.images is {images}, but .* 16 prompts x 16 images; {remedy}"):
        resolve_config("nft", **GAUSSIAN, overrides={"training.images": images})


def test_a_run_makes_as_many_images_as_announced(
    flowbench_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    small = ["--model", "gaussian", "--reward", "linear", "--device", "cpu", "--images", "96"]
    small += ["--set", "training.prompts_per_iteration=4", "--set", "training.images_per_prompt=8"]
    assert flowbench_main("run", "nft", *small, "--dry-run") == 0
    assert "96 training images (3840 function evaluations to sample them) in 3 iterations of 32" in " ".join(
        capsys.readouterr().out.split()
    )
    assert flowbench_main("run", "nft", *small, "--set", "evaluation.prompts=2", "--output", tmp_path) == 0
    (record,) = tmp_path.rglob("record.json")
    assert json.loads(record.read_text(encoding="utf-8"))["budget"]["images"] == 96


def test_a_budget_that_cannot_be_met_ends_the_command_with_2(flowbench_main: Main, capsys: pytest.CaptureFixture[str]):
    assert flowbench_main("run", "nft", "--images", "7", "--dry-run") == 2
    assert "an iteration makes 8 prompts x 4 images; use 32" in capsys.readouterr().err


def test_a_warm_up_that_eats_the_budget_is_refused_with_what_would_do():
    with pytest.raises(UsageError, match="all of which is acflow's warm-up of 3 iterations; use 1024 or more"):
        resolve_config("acflow", **GAUSSIAN, overrides={"training.images": 768, "algorithm.warmup": 3})
    enough = {"training.images": 1024, "algorithm.warmup": 3}
    assert resolve_config("acflow", **GAUSSIAN, overrides=enough).training.iterations == 4
    without = {"training.images": 768, "algorithm.warmup": 3, "algorithm.critic": "none"}  # nothing to warm up
    assert resolve_config("acflow", **GAUSSIAN, overrides=without).training.iterations == 3


@pytest.mark.parametrize(("warmup", "warned"), [(2, False), (3, True)])
def test_a_warm_up_of_more_than_a_fifth_is_warned_of(warmup: int, warned: bool, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="flowbench"):
        resolve("acflow", **GAUSSIAN, images=2560, settings={"algorithm.warmup": warmup})
    assert any(f"the warm-up of acflow is {warmup} of 10 iterations" in m for m in caplog.messages) is warned
