"""The analytic models in a test's hands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.config import resolve_config
from flowbench.evaluation.exact import quadratic_form
from flowbench.evaluation.judges import build_reward
from flowbench.experiments.run import build_algorithm, build_policy
from flowbench.models.families import load_pipeline
from flowbench.models.policy import Policy
from flowbench.models.presets import AnalyticPreset, load_preset
from flowbench.prompts import load_split
from flowbench.reward import Reward
from flowbench.testbeds.plane.density import QuadraticForm
from flowbench.training.trainer import Trainer

CPU = torch.device("cpu")


def analytic_preset(model: str) -> AnalyticPreset:
    preset = load_preset(model)
    assert isinstance(preset, AnalyticPreset)
    return preset


@pytest.fixture
def make_analytic_policy() -> Callable[..., Policy]:
    """A policy of its own for each call, in this precision; further arguments as in `Policy`."""

    def make(model: str = "gaussian", dtype: torch.dtype = torch.float32, **arguments: Any) -> Policy:
        preset = analytic_preset(model)
        torch.manual_seed(0)
        pipeline = load_pipeline(preset, CPU)
        pipeline.transformer.to(dtype)
        return Policy(pipeline, preset, **arguments)

    return make


@pytest.fixture(scope="session")
def point_reward() -> Callable[..., Reward]:
    """A reward of points with the model's own constants."""
    return lambda name, model="gaussian": build_reward(name, analytic_preset(model), CPU)


@pytest.fixture(scope="session")
def form(point_reward: Callable[..., Reward]) -> Callable[..., QuadraticForm]:
    return lambda name, model="gaussian": quadratic_form(point_reward(name, model))


@pytest.fixture
def make_analytic_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer of an algorithm on an analytic model; `overrides` as in `resolve_config`."""

    def make(algorithm: str, model: str = "gaussian", reward: str = "linear", **overrides: Any) -> Trainer:
        settings = {name.replace("__", "."): value for name, value in overrides.items()}
        config = resolve_config(algorithm, reward, model, overrides=settings, device="cpu")
        preset = analytic_preset(model)
        scorer = build_reward(reward, preset, CPU)
        policy, learner = build_policy(config, preset, CPU), build_algorithm(config, scorer)
        return Trainer(config, policy, learner, scorer, load_split(preset.prompts, "train").prompts, tmp_path)

    return make
