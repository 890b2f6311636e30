"""A run's checkpoint and log: all that resuming needs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbench.files import write_atomically
from flowbench.training.budget import Budget
from flowbench.training.state import load_state, save_state

if TYPE_CHECKING:
    from flowbench.training.trainer import Trainer

CHECKPOINT = "checkpoints/last.safetensors"
METRICS = "metrics.jsonl"


def save_checkpoint(trainer: Trainer) -> None:
    """Write everything that resuming needs; the previous checkpoint stays until the new one is complete.

    Nothing in it depends on the number of processes, and main alone writes it.
    """
    if not trainer.processes.is_main:
        return
    updater, algorithm = trainer.updater, trainer.algorithm
    optimizers = [updater.optimizer.state_dict()]
    if updater.auxiliary_optimizer:
        optimizers.append(updater.auxiliary_optimizer.state_dict())
    state = {
        "config_hash": trainer.config.hash(),
        "iteration": trainer.iteration,
        "budget": asdict(trainer.budget),
        "policy": trainer.policy.state_dict(),
        "average": updater.average.weights,
        "average_steps": updater.average.steps,
        "optimizers": optimizers,
        "networks": {name: n.state_dict() for name, n in algorithm.networks().items()},
        "algorithm": algorithm.state_dict(),
        "reward": trainer.reward.state_dict(),
    }
    save_state(trainer.folder / CHECKPOINT, state)


def restore_checkpoint(trainer: Trainer) -> bool:
    """Continue from the folder's checkpoint, if it has one; log lines after it are dropped.

    Every process reads it, so that machines need the folder in common.
    """
    path = trainer.folder / CHECKPOINT
    if not path.is_file():
        return False
    _restore(trainer, load_state(path))
    if trainer.processes.is_main:
        _cut_log(trainer.folder / METRICS, trainer.iteration)
    return True


def _restore(trainer: Trainer, state: dict[str, Any]) -> None:
    updater, algorithm, policy = trainer.updater, trainer.algorithm, trainer.policy
    trainer.iteration, trainer.budget = state["iteration"], Budget(**state["budget"])
    policy.load_state_dict(state["policy"])
    policy.evaluations.counts = dict(trainer.budget.evaluations)
    updater.updates = trainer.budget.updates
    updater.average.weights = [a.to(policy.device) for a in state["average"]]
    updater.average.steps = state["average_steps"]
    updater.optimizer.load_state_dict(state["optimizers"][0])
    if updater.auxiliary_optimizer:
        updater.auxiliary_optimizer.load_state_dict(state["optimizers"][1])
    for name, network in algorithm.networks().items():
        network.load_state_dict(state["networks"][name])
    algorithm.load_state_dict(state["algorithm"])
    trainer.reward.load_state_dict(state.get("reward", {}))


def _cut_log(path: Path, iterations: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    write_atomically(path, "".join(lines[:iterations]))  # a run that dies now is resumed from here again
