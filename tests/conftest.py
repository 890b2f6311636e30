"""Shared fixtures: the embedded model with few sampler steps, and configurations of a few images."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small import SMALL

from flowbench.cli import main as cli
from flowbench.config import RunConfig, resolve_config
from flowbench.evaluation.judges import build_reward
from flowbench.experiments import run as running
from flowbench.experiments.run import build_algorithm, build_policy
from flowbench.models.families import load_pipeline
from flowbench.models.policy import Policy, Tuning
from flowbench.models.presets import ModelPreset, load_preset
from flowbench.prompts import load_split
from flowbench.registry import algorithms, rewards
from flowbench.reward import Reward
from flowbench.training.trainer import IterationLog, Trainer

CPU = torch.device("cpu")
os.environ["FLOWBENCH_CACHE"] = "off"  # no test depends on what earlier ones kept, or leaves anything with the user

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: more threads than cores slow each other down
    torch.set_num_threads(1)

# As in flowbench's command: looking for garbage among the million objects of the libraries took a tenth of all tests.
gc.set_threshold(100_000, 20, 20)
FROZEN = {"modules": 0}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What libraries brought since the last look is never garbage, and is not looked at again."""
    if len(sys.modules) > FROZEN["modules"] + 100:
        gc.collect()
        gc.freeze()
        FROZEN["modules"] = len(sys.modules)


PICTURES = {name: getattr(running, name) for name in ("draw", "draw_study")}


@pytest.fixture(scope="session", autouse=True)
def without_pictures() -> Iterator[None]:
    """A run's own pictures take as long as the small runs of most tests, which do not look at them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(running, name, lambda *_: None)
        yield


@pytest.fixture(scope="session")
def pictures() -> Callable[[], AbstractContextManager[None]]:
    """For tests that do: runs made inside of it draw."""

    @contextmanager
    def drawn() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, draw in PICTURES.items():
                patch.setattr(running, name, draw)
            yield

    return drawn


@pytest.fixture(scope="session")
def preset_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model file: mini-sd3 with four sampler steps and no defaults of its own, so that tests set what they need."""
    plain = {"name": "tiny", "num_steps": 4, "training": {}, "evaluation": {}, "algorithms": {}}
    content = load_preset("mini-sd3").model_dump() | plain
    path = tmp_path_factory.mktemp("preset") / "tiny.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def preset(preset_file: str) -> ModelPreset:
    return load_preset(preset_file)


@pytest.fixture(scope="session")
def pipeline(preset: ModelPreset) -> Any:
    return load_pipeline(preset, CPU)


@pytest.fixture(scope="session")
def clip(preset: ModelPreset) -> Reward:
    return build_reward("clip", preset, CPU)


@pytest.fixture(scope="session")
def shared_policy(pipeline: Any, preset: ModelPreset) -> Policy:
    """For tests that leave weights alone."""
    return Policy(copy.deepcopy(pipeline), preset)


@pytest.fixture
def make_policy(pipeline: Any, preset: ModelPreset) -> Callable[..., Policy]:
    """A policy of its own for each call; arguments as in `Policy`, after pipeline and preset."""

    def make(tuning: Tuning = Tuning(), **arguments: Any) -> Policy:
        torch.manual_seed(0)
        return Policy(copy.deepcopy(pipeline), preset, tuning, **arguments)

    return make


@pytest.fixture(scope="session")
def tiny_config(preset_file: str) -> Callable[..., RunConfig]:
    """The configuration of a run of two iterations with 16 images each; `overrides` as in `resolve_config`."""

    def make(
        algorithm: str = "acflow", reward: str = "jpeg", seed: int = 0, overrides: dict[str, Any] | None = None
    ) -> RunConfig:
        brief = {"algorithm.warmup": 0} if algorithm == "acflow" else {}  # two iterations have no room for one
        settings = {**SMALL, **brief, **(overrides or {})}
        return resolve_config(algorithm, reward, preset_file, overrides=settings, seed=seed, device="cpu")

    return make


@pytest.fixture
def make_trainer(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """A trainer with its own policy, on the first eight training prompts, in a folder."""
    monkeypatch.setattr("flowbench.experiments.run.load_pipeline", lambda preset, device: copy.deepcopy(pipeline))

    def make(config: RunConfig, folder: Path, reward: Reward | None = None) -> Trainer:
        preset = load_preset(config.model)
        reward = reward or build_reward(config.reward, preset, CPU)
        folder.mkdir(parents=True, exist_ok=True)
        prompts = load_split(preset.prompts, "train").prompts[:8]
        algorithm = build_algorithm(config, reward)
        return Trainer(config, build_policy(config, preset, CPU), algorithm, reward, prompts, folder)

    return make


@pytest.fixture
def scheduler_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes are of models as they were when all were sampled on the scheduler's own grid."""

    def as_it_was(name: str, resolve: bool = True) -> ModelPreset:
        return load_preset(name, resolve).model_copy(update={"sigma_spacing": "pipeline"})

    monkeypatch.setattr("flowbench.config.load_preset", as_it_was)


@pytest.fixture
def clean_registry() -> Any:
    """Plug-ins that a test registers are forgotten after it."""
    for registry in (algorithms, rewards):
        for name in registry.names():
            registry.get(name)  # a module registers only once, when it is imported
    before = dict(algorithms.loaded), dict(rewards.loaded)
    yield
    for registry, loaded in zip((algorithms, rewards), before, strict=True):
        registry.loaded.clear()
        registry.loaded.update(loaded)


@pytest.fixture
def flowbench_main(monkeypatch: pytest.MonkeyPatch, clean_registry: None) -> Callable[..., int]:
    """Runs the command line in this process and returns its exit code."""

    def main(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["flowbench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return main


@pytest.fixture
def flowbench_process() -> Callable[..., subprocess.Popen[str]]:
    """Starts the command line in a process of its own."""

    def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        threads = str(torch.get_num_threads())
        return subprocess.Popen(
            [sys.executable, "-m", "flowbench", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", **environment},
        )

    return start


def small_settings(**changed: Any) -> list[str]:
    """SMALL as `--set` arguments."""
    values = {**SMALL, **{key.replace("__", "."): value for key, value in changed.items()}}
    return [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]


@pytest.fixture(scope="session")
def settings() -> Callable[..., list[str]]:
    return small_settings


def without_seconds(log: IterationLog | dict[str, Any]) -> dict[str, Any]:
    line = dict(log) if isinstance(log, dict) else vars(log)
    return {key: value for key, value in line.items() if key != "seconds"}


@pytest.fixture(scope="session")
def read_log() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of a run folder's metrics.jsonl without their wall time."""

    def read(folder: Path) -> list[dict[str, Any]]:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [without_seconds(json.loads(line)) for line in lines]

    return read
