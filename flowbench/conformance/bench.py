"""Short runs of an algorithm, watched and compared."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowbench.algorithm import Algorithm
from flowbench.config import RunConfig, resolve_config
from flowbench.conformance.learning import SEEDS, Learned, measure
from flowbench.conformance.verdict import one_line
from flowbench.conformance.watch import Observation, Watcher
from flowbench.errors import RunInterruptedError
from flowbench.evaluation.judges import build_reward
from flowbench.experiments.run import build_algorithm, build_policy
from flowbench.models.policy import Policy
from flowbench.models.presets import AnalyticPreset, load_preset
from flowbench.prompts import load_split
from flowbench.registry import algorithms
from flowbench.reward import Reward
from flowbench.training.checkpoint import METRICS
from flowbench.training.trainer import IterationLog, Trainer

CPU = torch.device("cpu")
SHORT = {
    "training.prompts_per_iteration": 4,
    "training.images_per_prompt": 8,
    "training.auxiliary_steps": 2,
    "training.checkpoint_every": 1,
}
PATIENCE = 40  # iterations in which the policy must have had a loss
BUDGET_SHARE = 2  # half of the model's budget is enough to tell learning from standing still
AFTERWARDS = 4  # iterations that a short run has from there on


class _EnoughError(Exception):
    """Ends a run from its callback."""


@dataclass(frozen=True)
class Finished:
    """A run's end: its log without wall time, and everything that a checkpoint holds."""

    log: list[dict[str, Any]]
    state: dict[str, Any]


class AlgorithmBench:
    """Runs one algorithm with its defaults on a model, in folders below `folder`; results are kept."""

    def __init__(self, name: str, model: str, folder: Path) -> None:
        self.name, self.model, self.folder = name, model, folder
        self.plugin, self.preset = algorithms.get(name), load_preset(model)
        self.analytic = isinstance(self.preset, AnalyticPreset)
        self.reward_name = "linear" if self.analytic else "clip"
        self._numbers = count()

    @cached_property
    def reward(self) -> Reward:
        """The reward of all runs: linear on an analytic model, else clip."""
        return build_reward(self.reward_name, self.preset, CPU)

    def config(self, overrides: Mapping[str, Any], seed: int = 0) -> RunConfig:
        """The model's defaults for the algorithm, changed."""
        return resolve_config(
            self.name, self.reward_name, self.model, overrides=dict(overrides), seed=seed, device="cpu"
        )

    def short(self, iterations: int) -> RunConfig:
        """A run of a few iterations with 32 images each."""
        return self.config({**SHORT, "training.images": 32 * iterations})

    def policy(self, config: RunConfig) -> Policy:
        """A policy of its own."""
        return build_policy(config, self.preset, CPU)

    def trainer(
        self,
        config: RunConfig,
        *,
        folder: Path | None = None,
        on_iteration: Callable[[IterationLog], None] = lambda log: None,
        watch: Callable[[Algorithm, Policy], None] = lambda algorithm, policy: None,
    ) -> Trainer:
        """A trainer with policy and algorithm of its own; `watch` may wrap the algorithm's methods before setup."""
        folder = folder or self.folder / str(next(self._numbers))
        folder.mkdir(parents=True, exist_ok=True)
        policy, algorithm = self.policy(config), build_algorithm(config, self.reward)
        watch(algorithm, policy)
        prompts = load_split(self.preset.prompts, "train").prompts[:16]
        return Trainer(config, policy, algorithm, self.reward, prompts, folder, on_iteration)

    # --- watched ----------------------------------------------------------------------------------------------------

    @cached_property
    def observed(self) -> Observation:
        """A short run with rollouts that hold only what the algorithm declares, up to a few policy updates."""
        seen = Observation()
        watchers: list[Watcher] = []
        last = AFTERWARDS + 1  # iteration of the run

        def watch(algorithm: Algorithm, policy: Policy) -> None:
            watchers.append(Watcher(algorithm, policy, seen, self.plugin.info.needs))

        def enough(log: IterationLog) -> None:
            nonlocal last
            seen.iterations = log.iteration
            if seen.first_policy_loss is None:
                last = log.iteration + AFTERWARDS + 1
            elif log.iteration >= last:
                raise _EnoughError

        try:
            trainer = self.trainer(self.short(PATIENCE), on_iteration=enough, watch=watch)
            trainer.run()
        except _EnoughError:
            pass
        except RunInterruptedError:
            raise
        except Exception as error:  # noqa: BLE001 - a plug-in may raise anything
            seen.fault = (seen.stage, one_line(error))
        for watcher in watchers:
            watcher.close()
        return seen

    @property
    def iterations(self) -> int:
        """How long a run is that has seen a few policy updates."""
        return max(self.observed.iterations, AFTERWARDS)

    @cached_property
    def learned(self) -> list[Learned]:
        """Runs on the linear reward with the model's defaults and a share of its budget, one per seed."""
        training = self.config({}).training
        images = training.iterations // BUDGET_SHARE * training.images_per_iteration
        configs = [self.config({"training.images": images}, seed) for seed in range(SEEDS)]
        return [measure(self.trainer(config), self.policy(config), self.reward) for config in configs]

    # --- compared ---------------------------------------------------------------------------------------------------

    @cached_property
    def straight(self) -> Finished:
        """A short run without interruption."""
        trainer = self.trainer(self.short(self.iterations))
        trainer.run()
        return finished(trainer)

    def again(self) -> Finished:
        """The same run, while others use the global random generators."""

        def disturb(log: IterationLog) -> None:
            torch.rand(1), random.random(), np.random.rand()

        trainer = self.trainer(self.short(self.iterations), on_iteration=disturb)
        trainer.run()
        return finished(trainer)

    def interrupted(self, at: int) -> tuple[Trainer, Trainer]:
        """A run stopped after iteration `at`, and a new one made from its checkpoint, not yet continued."""

        def stop(log: IterationLog) -> None:
            if log.iteration == at:
                raise _EnoughError

        config = self.short(self.iterations)
        first = self.trainer(config, on_iteration=stop)
        with suppress(_EnoughError):
            first.run()
        second = self.trainer(config, folder=first.folder)
        second.resume()
        return first, second


def finished(trainer: Trainer) -> Finished:
    """The end of a trainer's run."""
    lines = (trainer.folder / METRICS).read_text(encoding="utf-8").splitlines()
    return Finished([{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines], state(trainer))


def state(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint must keep, by name."""
    optimizers = {"optimizer": trainer.updater.optimizer, "auxiliary optimizer": trainer.updater.auxiliary_optimizer}
    return {
        "policy": trainer.policy.state_dict(),
        **{name: optimizer.state_dict() for name, optimizer in optimizers.items() if optimizer},
        **{name: network.state_dict() for name, network in trainer.algorithm.networks().items()},
        "algorithm's state_dict": trainer.algorithm.state_dict(),
    }


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """Where two trees of dicts, lists, tensors and plain values first differ; None if they agree to the last bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if torch.equal(a.cpu(), b.cpu()) else path
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if odd := set(a) ^ set(b):
            return f"{path}.{min(odd, key=str)}".lstrip(".")
        return next((d for k in a if (d := difference(a[k], b[k], f"{path}.{k}".lstrip(".")))), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):  # JSON has no tuples
        if len(a) != len(b):
            return path
        return next(
            (d for i, (x, y) in enumerate(zip(a, b, strict=True)) if (d := difference(x, y, f"{path}[{i}]"))), None
        )
    same = a == b or (a != a and b != b)  # NaN
    return None if same else path
