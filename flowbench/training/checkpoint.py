"""A run's checkpoints and log: all that going on needs, whatever ends the run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from flowbench.errors import RunError, UsageError
from flowbench.files import flush, write_atomically
from flowbench.training.budget import Budget
from flowbench.training.state import FrozenState, freeze, load_state

if TYPE_CHECKING:
    from flowbench.training.trainer import Trainer

CHECKPOINT = "checkpoints/last.safetensors"
EARLIER = "checkpoints/iteration-*.safetensors"
METRICS = "metrics.jsonl"
AGAIN = "the same command with --resume continues"
KEPT = 2  # checkpoints of a run at work, where nobody says: the newest, and one to fall back on
HELD_BYTES = 4 << 30  # the largest state that is also held in memory while an iteration changes it

logger = logging.getLogger("flowbench")


class Checkpoints:
    """The checkpoints of a trainer's run, which main alone writes.

    saved: the iteration of the newest one on disk, None before there is one; changing: whether the iteration at work
    has begun to change what training goes on from. While an iteration is at work the state that it began with is held
    in memory, so that it can be written whatever happens on the way; where that would take more than `HELD_BYTES`, an
    iteration that fails after its rollout falls back to the newest one on disk.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.folder = trainer, trainer.folder
        self.saved: int | None = None
        self._held: FrozenState | None = None
        self._begun: tuple[int, Budget] | None = None  # the iteration at work: those done before it, and their budget
        self.changing = False
        self._spoiled = False  # whether the newest file is not to be kept: it is damaged

    @contextmanager
    def iteration(self, before: Budget) -> Iterator[None]:
        """Within it the trainer's state changes; before: the budget that it began with."""
        if self.trainer.processes.is_main:
            self._hold()
        self._begun, self.changing = (self.trainer.iteration, before), False
        yield
        self._begun = None  # after an error it stays, and says that the state is in between

    def write(self) -> None:
        """Write the state between two iterations, unless it is there; the newest before it stays until it is."""
        if self.trainer.processes.is_main and self.saved != self.trainer.iteration:
            self._write(freeze(_state(self.trainer)), self.trainer.iteration)

    def rescue(self) -> int | None:
        """Write the last good state, after an error; its iteration, or that of the newest checkpoint on disk."""
        trainer = self.trainer
        if not trainer.processes.is_main:
            return self.saved
        try:
            if self._begun is None:
                self.write()
            elif self.saved == self._begun[0]:
                pass
            elif self._held is not None:
                self._write(self._held, self._begun[0])
            elif not self.changing:
                trainer.budget = self._begun[1]
                self.write()
        except (OSError, RuntimeError, MemoryError, SafetensorError, UsageError) as error:
            # The disk or the memory is full. What is on the disk is whole.
            reason = (str(error) or type(error).__name__).splitlines()[0]
            logger.warning("the last good iteration cannot be saved: %s", reason)
        return self.saved

    def restore(self) -> bool:
        """Go on from the newest checkpoint that is whole, or else from the beginning; log lines after it are dropped.

        Whether there is one, it says.

        Every process reads it, so that machines need the folder in common. Raises UsageError for a checkpoint of other
        settings, RunError when all are damaged.
        """
        damaged: list[str] = []
        for path in checkpoint_files(self.folder):
            try:
                state = load_state(path)
            except RunError as error:
                damaged.append(str(error))
                continue
            _check(self.trainer, state, path)
            _restore(self.trainer, state)
            self.saved, self._spoiled = self.trainer.iteration, bool(damaged)
            if damaged:
                logger.warning("%s; the run goes on from the one before, of iteration %d", damaged[0], self.saved)
            if self.trainer.processes.is_main:
                _cut_log(self.folder / METRICS, self.saved)
            return True
        if damaged:
            raise RunError(f"{damaged[0]}, and there is no other to fall back on; begin anew with --overwrite")
        if self.trainer.processes.is_main and (self.folder / METRICS).is_file():
            _cut_log(self.folder / METRICS, 0)
        return False

    def keep_only(self, count: int) -> None:
        """Remove all but the newest `count`."""
        for path in checkpoint_files(self.folder)[count:]:
            path.unlink(missing_ok=True)

    def _hold(self) -> None:
        # While it is copied into there is none: the trainer's own state is whole then.
        memory, self._held = self._held.tensors if self._held else {}, None
        state = _state(self.trainer)
        if _bytes(state) <= HELD_BYTES:
            self._held = freeze(state, memory)

    def _write(self, state: FrozenState, iteration: int) -> None:
        path, count = self.folder / CHECKPOINT, self.trainer.config.training.keep_checkpoints or KEPT
        if count > 1 and self.saved is not None and not self._spoiled and path.is_file():
            _name_also(path, self.folder / EARLIER.replace("*", f"{self.saved:06d}"))
        flush(self.folder / METRICS)  # a checkpoint is never ahead of its log
        state.save(path)
        self.saved, self._spoiled = iteration, False
        self.keep_only(count)


@contextmanager
def rescued(trainer: Trainer) -> Iterator[None]:
    """Within it, whatever ends the run leaves its last good iteration, and says once where: in a note of the error."""
    try:
        yield
    except BaseException as error:
        if not getattr(error, "__notes__", None):
            saved = trainer.checkpoints.rescue()
            if saved is not None:
                where = f"iteration {saved} of {trainer.iterations} is saved in '{trainer.folder}'"
                error.add_note(f"{where}; {trainer.again}")
        raise


def checkpoint_files(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    newest = folder / CHECKPOINT
    earlier = sorted(folder.glob(EARLIER), key=lambda path: path.name, reverse=True)
    return [*([newest] if newest.is_file() else []), *earlier]


def _state(trainer: Trainer) -> dict[str, Any]:
    """Everything that going on needs. Nothing in it depends on the number of processes."""
    updater, algorithm = trainer.updater, trainer.algorithm
    optimizers = [updater.optimizer.state_dict()]
    if updater.auxiliary_optimizer:
        optimizers.append(updater.auxiliary_optimizer.state_dict())
    return {
        "config_hash": trainer.config_hash,
        "seed": trainer.config.seed,
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


def _check(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """Raise UsageError for the checkpoint of another run."""
    seed, iteration, images = state.get("seed", trainer.config.seed), state["iteration"], state["budget"]["images"]
    if state["config_hash"] != trainer.config_hash:
        what = f"settings, of hash {state['config_hash']} and not {trainer.config_hash}"
    elif seed != trainer.config.seed:
        what = f"seed, {seed} and not {trainer.config.seed}"
    elif not 0 <= iteration <= trainer.iterations or images != iteration * trainer.config.training.images_per_iteration:
        what = f"budget: iteration {iteration} of {trainer.iterations} with {images} images"
    elif differs := _differs(_tensors(state), _tensors(_state(trainer))):
        what = f"model: {differs}"
    else:
        return
    raise UsageError(f"'{path}' is the checkpoint of a run with another {what}; put the right one there, or delete it")


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Those that the model decides, by name."""
    views = {f"{view}/{i}": t for view, tensors in state["policy"].items() for i, t in enumerate(tensors)}
    average = {f"average/{i}": t for i, t in enumerate(state["average"])}
    networks = {f"{name}/{key}": t for name, own in state["networks"].items() for key, t in own.items()}
    return {**views, **average, **networks}


def _differs(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> str:
    for name in {**ours, **theirs}:
        if name not in theirs or name not in ours:
            return f"weights {name} are {'missing' if name in ours else 'too many'}"
        (dtype, shape), (own, needed) = ((t.dtype, tuple(t.shape)) for t in (theirs[name], ours[name]))
        if (dtype, shape) != (own, needed):
            return f"weights {name} are {dtype} {shape}, and not {own} {needed}".replace("torch.", "")
    return ""


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
    """Keep the lines of the first iterations, each once, up to one that is damaged."""
    kept: list[bytes] = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        if len(kept) == iterations:
            break
        number = _iteration(line)
        if number is None:
            continue
        if number == len(kept) + 1:
            kept.append(line + b"\n")
    if len(kept) < iterations:
        logger.warning("'%s' lacks lines of iterations before %d", path, iterations)
    write_atomically(path, b"".join(kept))  # a run that dies now goes on from here again


def _iteration(line: bytes) -> int | None:
    try:
        content = json.loads(line)
        return int(content["iteration"])
    except (ValueError, LookupError, TypeError):
        return None


def _name_also(path: Path, other: Path) -> None:
    """Keep a file under another name too; where the system has no such links, under that one alone."""
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError:
        os.replace(path, other)


def _bytes(node: Any) -> int:
    if isinstance(node, torch.Tensor):
        return node.numel() * node.element_size()
    if isinstance(node, dict):
        return sum(map(_bytes, node.values()))
    return sum(map(_bytes, node)) if isinstance(node, list | tuple) else 0
