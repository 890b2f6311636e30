"""Runs that one process and two make alike: defined once, made by a test alone and by `python shared_runs.py` together.

With two processes the script is started twice, each with its rank in the environment.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_pipelines
import torch

from flowbench.algorithm import Batch, Loss
from flowbench.algorithms.orw_cfm_w2 import OrwCfmW2
from flowbench.config import RunConfig, resolve_config
from flowbench.errors import RunError, RunInterruptedError
from flowbench.evaluation.judges import build_reward
from flowbench.evaluation.protocol import Judges, SplitScores, score_split
from flowbench.experiments.run import build_algorithm, build_policy
from flowbench.models.policy import Policy
from flowbench.models.presets import load_preset
from flowbench.models.processes import ALONE, Processes, started
from flowbench.prompts import load_split
from flowbench.registry import algorithms
from flowbench.reward import Reward, register_reward
from flowbench.training.state import save_state
from flowbench.training.trainer import Trainer

CPU = torch.device("cpu")

# Three prompts and five rows to a minibatch are no even shares of two processes.
TRAINING: dict[str, Any] = {
    "training.images": 24,
    "training.prompts_per_iteration": 3,
    "training.images_per_prompt": 4,
    "training.num_steps": 3,
    "training.minibatch": 5,
    "training.microbatch": 2,
    "training.learning_rate": 1e-3,
    "training.auxiliary_steps": 2,
    "training.ema": 0.9,
    "evaluation.prompts": 5,
    "evaluation.images_per_prompt": 3,
    "evaluation.splits": ["test"],
    "evaluation.points": 0,
}


@dataclass(frozen=True)
class Case:
    """A run of two iterations; overrides: beside TRAINING; half: all weights but the trained ones in bfloat16."""

    algorithm: str
    overrides: dict[str, Any] = field(default_factory=dict)
    model: str = "gaussian"
    reward: str = "linear"
    whole_groups: bool = False
    half: bool = False


# Of 24 rows one is left over: then one of two processes has none.
PREVIEW = {"algorithm.log_preview": True, "training.minibatch": 23}
STEPS = {"training.minibatch": 13, "algorithm.clip_range": 0.1}
LORA = {"training.tuning": "lora", "training.lora_rank": 4, "training.num_steps": 2, "training.images": 12}
LORA |= {"training.images_per_prompt": 2, "training.gradient_checkpointing": True}
SD3 = "sd3"  # replaced by the folder of a tiny pipeline

CASES: dict[str, Case] = {
    "acflow": Case("acflow", {"algorithm.warmup": 1, "algorithm.states_per_image": 2}),
    "acflow sees": Case("acflow", {"algorithm.warmup": 1, "algorithm.critic": "sees", **PREVIEW}),
    "adrpo": Case("adrpo"),
    "awm": Case("awm", {"algorithm.average_ramp": 0.1}),
    "ddpo": Case("ddpo", {"training.sampler": "flow-sde", **STEPS}),
    "dpok": Case("dpok", STEPS),
    "draft": Case("draft", {"algorithm.noises": 2}),
    "flow-grpo": Case("flow-grpo", {**STEPS, "training.sde_window": 2, "algorithm.steps_per_image": 1}),
    "nft": Case("nft", {"algorithm.old_ramp": 0.2}),
    "online-dpo": Case("online-dpo", {"algorithm.states_per_pair": 2}),
    "orw-cfm-w2": Case("orw-cfm-w2", {"training.reward_scale": "standardized"}, reward="linear:0.5+quadratic:0.5"),
    "raft": Case("raft"),
    "refl": Case("refl", {"training.epochs": 2}),
    "whole groups": Case("orw-cfm-w2", {"training.minibatch": 12, "training.microbatch": 4}, whole_groups=True),
    "sd3 acflow": Case("acflow", {**LORA, "algorithm.warmup": 0}, SD3, "evenly-shaded"),
    "sd3 flow-grpo": Case("flow-grpo", {**LORA, "training.minibatch": 13}, SD3, "evenly-shaded"),
    "sd3 nft": Case("nft", {**LORA, "algorithm.old_ramp": 0.2}, SD3, "evenly-shaded"),
}


def beside_t5(algorithm: str) -> Case:
    """One iteration of LoRA beside a tiny SD3 with T5 in half precision."""
    fields = algorithms.get(algorithm).cls.Config.model_fields
    few = {f"algorithm.{name}": 0 for name in ("warmup",) if name in fields}
    return Case(algorithm, {**LORA, "training.images": 6, **few}, SD3, "evenly-shaded", half=True)


HALF: dict[str, Case] = {f"t5 {name}": beside_t5(name) for name in algorithms.names()}
ALL: dict[str, Case] = {**CASES, **HALF}


class Centred(OrwCfmW2):
    """Its loss compares the rows of a group, which must therefore be in one process."""

    whole_groups = True

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        loss = super().loss(policy, batch).policy
        assert loss is not None
        assert batch.group is not None
        count = batch.group.bincount()[batch.group]
        assert (count == 4).all()
        sums = loss.new_zeros(int(batch.group.max()) + 1).index_add(0, batch.group, loss)
        return Loss(loss * (loss - sums[batch.group] / 4).detach().sigmoid())


@register_reward("unsteady", source="tests", licence="none", range=(0.0, 1.0), differentiable=False, domain="points")
class Brittle(Reward):
    """The first coordinate, until its second call in the process of that rank, which gives NaN."""

    calls, rank = 0, 1

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        self.calls += 1
        broken = self.calls == 2 and int(os.environ.get("RANK", 0)) == self.rank
        return images.flatten(1)[:, 0] * (math.nan if broken else 1.0)


@register_reward("evenly-shaded", source="tests", licence="none", range=(0.0, 1.0), differentiable=True)
class Shade(Reward):
    """The mean brightness of an image."""

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return images.mean((1, 2, 3))


def configuration(case: Case, root: Path) -> RunConfig:
    model = str(root / SD3) if case.model == SD3 else case.model
    return resolve_config(case.algorithm, case.reward, model, overrides={**TRAINING, **case.overrides}, device="cpu")


def make_trainer(case: Case, root: Path, folder: Path, processes: Processes) -> Trainer:
    config = configuration(case, root)
    preset = load_preset(config.model)
    if case.model == SD3:
        assert preset.has_t5
        precision = "bfloat16" if case.half else "float32"
        preset = preset.model_copy(update={"max_sequence_length": 32, "num_steps": 2, "cpu_dtype": precision})
    reward = build_reward(config.reward, preset, CPU, config.training.reward_scale == "standardized")
    policy = build_policy(config, preset, CPU)
    policy.processes = processes
    algorithm = build_algorithm(config, reward)
    if case.whole_groups:
        algorithm = Centred(algorithm.cfg)
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(config, policy, algorithm, reward, load_split(preset.prompts, "train").prompts[:7], folder)


def state(trainer: Trainer) -> dict[str, Any]:
    """What a run learned and spent."""
    budget, updater = trainer.budget, trainer.updater
    return {
        "current": [p.detach() for p in updater.parameters],
        "average": updater.average.weights,
        "networks": [p.detach() for p in updater.auxiliary_parameters],
        "spent": [budget.images, budget.reward_calls, budget.function_evaluations],
    }


def train(name: str, root: Path, folder: Path, processes: Processes = ALONE) -> dict[str, Any]:
    """Make the run of a case in a folder; returns `state`."""
    trainer = make_trainer(ALL[name], root, folder, processes)
    trainer.run()
    return state(trainer)


def stop_after_one(name: str, root: Path, folder: Path, processes: Processes = ALONE, rank: int = 0) -> str:
    """Begin that run; a signal to the process of this rank ends it after its first iteration. Returns what it says."""
    trainer = make_trainer(ALL[name], root, folder, processes)
    trainer.on_iteration = lambda log: os.kill(os.getpid(), signal.SIGINT) if processes.rank == rank else None
    try:
        trainer.run()
    except RunInterruptedError as error:
        return str(error)
    return "not interrupted"


def resume(name: str, root: Path, folder: Path, processes: Processes = ALONE) -> dict[str, Any]:
    """Continue that run to its end; returns `state`."""
    trainer = make_trainer(ALL[name], root, folder, processes)
    assert trainer.resume()
    assert trainer.iteration == 1
    trainer.run()
    return state(trainer)


def evaluate(root: Path, processes: Processes = ALONE) -> SplitScores:
    """Scores of five prompts of an untrained model."""
    trainer = make_trainer(CASES["orw-cfm-w2"], root, root, processes)
    split = load_split(load_preset("gaussian").prompts, "test")
    judges = Judges({"linear": build_reward("linear", load_preset("gaussian"), CPU)}, oracle=False)
    return score_split(trainer.policy, "current", split, judges, trainer.config.evaluation, lambda n: None)


def failure(case: Case, root: Path, folder: Path, device: str, wrong: bool = False) -> str:
    """What this process says of a run that fails in the other."""
    try:
        with started(device) as processes:
            trainer = make_trainer(case, root, folder, processes)
            if wrong:
                trainer.algorithm.after_update = lambda policy: policy.trainable_parameters()[0].data.add_(
                    1e-6 * processes.rank
                )
            trainer.run()
    except RunError as error:
        return f"{type(error).__name__}: {error}"
    return "no failure"


def main(root: Path) -> None:
    """All runs, shared by two processes; what each learned and said lies then below root."""
    said: dict[str, Any] = {}
    with started("cpu") as processes:
        for name in ALL:
            result = train(name, root, root / "shared" / name, processes)
            if processes.is_main:
                save_state(root / "shared" / name / "state", result)
        resumed = resume("acflow", root, root / "stopped alone", processes)
        said["interrupted"] = stop_after_one("acflow", root, root / "stopped together", processes, rank=1)
        scores = evaluate(root, processes)
        if processes.is_main:
            save_state(root / "shared" / "resumed", resumed)
            evaluated = {name: torch.from_numpy(values) for name, values in scores.scores.items()}
            save_state(root / "shared" / "evaluated", {"scores": evaluated, "grid": scores.grid})
    brittle = Case("orw-cfm-w2", reward="unsteady")
    said["failed"] = failure(brittle, root, root / "failed", "cpu")
    said["differs"] = failure(CASES["orw-cfm-w2"], root, root / "differs", "cpu", wrong=True)
    (root / f"said-{processes.rank}.json").write_text(json.dumps(said), encoding="utf-8")
    if processes.rank == 1:
        os._exit(9)  # as a process does that the kernel kills
    try:
        processes.wait()
    except RunError as error:
        print(error)


def save_pipeline(root: Path) -> None:
    """The tiny SD3 that some cases train."""
    tiny_pipelines.sd3().save_pretrained(root / SD3)


if __name__ == "__main__":
    gc.set_threshold(100_000, 20, 20)  # as in flowbench's command
    main(Path(sys.argv[1]))
