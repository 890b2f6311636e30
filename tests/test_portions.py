"""What an iteration keeps in memory, how its work is divided, and what happens when memory runs out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SMALL
from tiny_pipelines import sd3

from flowbench.config import RunConfig, resolve_config
from flowbench.errors import RunError
from flowbench.evaluation.judges import build_reward
from flowbench.experiments.run import build_algorithm, build_policy
from flowbench.models.families import family_class
from flowbench.models.presets import load_preset
from flowbench.prompts import load_split
from flowbench.reward import Reward
from flowbench.rollout import Rollout, RolloutPlan
from flowbench.stored import Shelf, StoredRows
from flowbench.training.trainer import IterationLog, Trainer

MakeConfig = Callable[..., RunConfig]
MakeTrainer = Callable[..., Trainer]


# --- a rollout in portions --------------------------------------------------------------------------------------------


@pytest.fixture
def collected(tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer) -> Callable[..., list[Rollout]]:
    """One iteration of 16 images in four groups, sampled all at once and in fives, so that a single one is left."""

    def collect(algorithm: str, plan: RolloutPlan, settings: dict[str, Any]) -> list[Rollout]:
        trainer = make_trainer(tiny_config(algorithm, overrides=settings), tmp_path)
        trainer.algorithm.plan = lambda: plan
        rollouts = []
        for size in (None, 5):
            trainer.collector.sampling.size = size
            rollouts.append(trainer.collector.collect(0, trainer.budget))
        return rollouts

    return collect


@pytest.mark.parametrize(
    ("algorithm", "plan", "settings"),
    [
        ("raft", RolloutPlan(), {}),
        ("flow-grpo", RolloutPlan(keep_steps=True, shared_noise=True), {}),
        ("flow-grpo", RolloutPlan(keep_steps=True, branch_step=1), {"training.sde_window": 3}),
    ],
)
def test_a_rollout_is_the_same_however_many_images_are_sampled_at_a_time(
    collected: Callable[..., list[Rollout]], algorithm: str, plan: RolloutPlan, settings: dict[str, Any]
):
    whole, part = collected(algorithm, plan, settings)
    for name in ("x0", "images", "states", "step_mean", "step_std"):
        theirs, ours = getattr(whole, name), getattr(part, name)
        assert (ours is None) == (theirs is None) == (algorithm == "raft" and name[0] == "s")
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())
    if whole.states is not None:
        assert torch.equal(part.states[:, 0], whole.states[:, 0])
        torch.testing.assert_close(part.log_prob, whole.log_prob, rtol=1e-4, atol=1e-2)


# --- one copy of everything -------------------------------------------------------------------------------------------


def storages(tensors: Any) -> dict[int, int]:
    """Bytes by storage."""
    found = {}
    for tensor in tensors:
        parts = (tensor.source, tensor.rows) if isinstance(tensor, StoredRows) else (tensor,)
        for part in parts:
            if isinstance(part, torch.Tensor):
                found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return found


def test_the_rows_of_an_iteration_and_of_its_minibatches_hold_no_second_copy_of_its_latents(
    tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer
):
    trainer = make_trainer(tiny_config("flow-grpo"), tmp_path)
    trainer.algorithm.plan = lambda: RolloutPlan(keep_steps=True)
    rollout = trainer.collector.collect(0, trainer.budget)
    batch = trainer.algorithm.prepare(rollout)
    theirs = storages(v for v in vars(rollout).values() if isinstance(v, torch.Tensor))
    (minibatch, *_) = trainer.updater.minibatches(batch, 0)
    for rows in (batch, minibatch):
        ours = storages(v for v in vars(rows).values() if isinstance(v, torch.Tensor))
        own = sum(size for storage, size in ours.items() if storage not in theirs)
        assert own < 0.02 * rollout.states.untyped_storage().nbytes()
        assert {v.source.data_ptr() for v in (rows.x, rows.x_next)} == {rollout.states.data_ptr()}
        assert rows.x0.source.data_ptr() == rollout.x0.data_ptr()
    assert torch.equal(batch.x, rollout.states[:, :-1].flatten(0, 1))
    assert torch.equal(batch.x_next, rollout.states[:, 1:].flatten(0, 1))
    assert torch.equal(batch.step_mean, rollout.step_mean.flatten(0, 1))
    fetched = minibatch.fetched()
    assert not any(isinstance(value, StoredRows) for value in vars(fetched).values())
    assert torch.equal(fetched.x, minibatch.x)


def test_beside_a_gpu_latents_lie_on_the_host_and_only_the_rows_that_are_used_leave_it():
    gpu = torch.device("meta")  # has no memory of its own, so that whatever is still there has not left the host
    shelf, parts = Shelf(5, gpu), torch.arange(20.0).view(5, 2, 2).split(2)
    for part in parts:
        shelf.add(part)
    whole = shelf.whole()
    assert (whole.device, whole.shape, whole.source.device.type) == (gpu, (5, 2, 2), "cpu")
    assert whole[1:3].device == whole[torch.tensor([2])].fetched().device == (whole + 1).device == gpu
    chosen = whole[torch.tensor([4, 0, 2])][torch.tensor([True, False, True])]
    assert chosen.device == gpu
    assert torch.equal(chosen.cpu(), torch.cat(parts)[[4, 2]])
    assert chosen.source.data_ptr() == whole.source.data_ptr()


# --- decoding with a gradient -----------------------------------------------------------------------------------------


def saved_bytes(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The result, and how much memory its backward pass finds."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    return result, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_with_checkpointing_the_decoders_memory_is_that_of_one_image_whatever_the_microbatch():
    pipeline = sd3()
    pipeline.vae.requires_grad_(False).eval().double()  # gradients to more digits than rows of a batch differ by
    family = family_class("sd3")(pipeline, load_preset("mini-sd3"))
    sizes, decode = [], pipeline.vae.decode
    pipeline.vae.decode = lambda z, **options: (sizes.append(len(z)), decode(z, **options))[1]
    latents = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def run(n: int, checkpoint: bool) -> tuple[torch.Tensor, int]:
        images, size = saved_bytes(lambda: family.decode(latents[:n], checkpoint=checkpoint))
        (gradient,) = torch.autograd.grad((images * weights[:n]).sum(), latents)
        return gradient, size

    (undivided, four), (_, one) = run(4, False), run(1, False)
    assert sizes == [4, 1]
    sizes.clear()
    divided, kept = run(4, True)
    assert sizes == [1] * 8  # once forward and once more in the backward pass, never two images at once
    images = 4 * 3 * 64 * 64 * 8
    assert kept <= latents.numel() * 8 + 3 * images  # what the checkpoints begin with, and the images
    assert kept + one < 0.5 * four
    torch.testing.assert_close(divided, undivided, rtol=1e-6, atol=1e-6 * undivided.abs().max().item())


# --- out of memory ----------------------------------------------------------------------------------------------------


class Limited:
    """Stands in for a method of `owner`: runs out of memory for more than `room` rows, from the second call on.

    rows: how many a call has, given its arguments.
    """

    def __init__(self, owner: Any, name: str, rows: Callable[..., int], room: int = 4) -> None:
        self.method, self.rows, self.room, self.failed, self.calls = getattr(owner, name), rows, room, 0, 0
        setattr(owner, name, self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        result = self.method(*args, **options)
        if self.rows(*args) > self.room and self.calls > 1:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result


def of_first(first: Any, *rest: Any) -> int:
    return len(first)


def of_second(first: Any, second: Any) -> int:
    return len(second)


LIMITS: dict[str, tuple[Callable[[Trainer], Limited], str]] = {
    "rollout": (lambda t: Limited(t.policy, "guided_velocity", of_first), "the rollout"),
    "decode": (lambda t: Limited(t.policy, "decode", of_first), "decoding"),
    "reward": (lambda t: Limited(t.reward, "score", of_first), "scoring"),
    "measure": (lambda t: Limited(t.algorithm, "measure", of_second), "the update"),
    "loss": (lambda t: Limited(t.algorithm, "loss", of_second), "the update"),
    "auxiliary loss": (lambda t: Limited(t.algorithm, "auxiliary_loss", of_second), "the update"),
}


def log_of(trainer: Trainer) -> list[IterationLog]:
    log: list[IterationLog] = []
    trainer.on_iteration = log.append
    trainer.run()
    return log


def check_limited(trainer: Trainer, phases: list[str], undisturbed: list[IterationLog], caplog: Any) -> None:
    """Whether a run with limits ends like one without, and says one line for each time that memory ran out."""
    limited = {phase: LIMITS[phase][0](trainer) for phase in phases}
    with caplog.at_level(logging.WARNING):
        log = log_of(trainer)
    assert all(method.failed > 0 for method in limited.values())
    assert sum(method.failed for method in limited.values()) == len(caplog.messages)  # smaller sizes are remembered
    for phase in phases:
        assert any(line.startswith(f"out of memory: {LIMITS[phase][1]} goes on with ") for line in caplog.messages)
    for ours, whole in zip(log, undisturbed, strict=True):
        assert ours.reward == pytest.approx(whole.reward, rel=1e-3, abs=1e-3)
        assert ours.metrics == pytest.approx(whole.metrics, rel=1e-3, abs=1e-3)


def in_the_plane(folder: Path) -> Trainer:
    settings = {**SMALL, "algorithm.warmup": 0, "training.auxiliary_steps": 2, "training.minibatch": 16}
    config = resolve_config("acflow", "linear", "gaussian", overrides=settings, device="cpu")
    preset, cpu = load_preset("gaussian"), torch.device("cpu")
    reward = build_reward("linear", preset, cpu)
    prompts = load_split(preset.prompts, "train").prompts
    folder.mkdir()
    return Trainer(config, build_policy(config, preset, cpu), build_algorithm(config, reward), reward, prompts, folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[IterationLog]:
    return log_of(in_the_plane(tmp_path_factory.mktemp("portions") / "plane"))


@pytest.mark.parametrize("phase", LIMITS)
def test_a_run_that_runs_out_of_memory_says_so_and_ends_like_one_that_finds_enough(
    phase: str, tmp_path: Path, undisturbed: list[IterationLog], caplog: pytest.LogCaptureFixture
):
    check_limited(in_the_plane(tmp_path / "plane"), [phase], undisturbed, caplog)


def test_on_images_too_everything_may_run_out_of_memory(
    tmp_path: Path,
    tiny_config: MakeConfig,
    make_trainer: MakeTrainer,
    clip: Reward,
    caplog: pytest.LogCaptureFixture,
):
    config = tiny_config(reward="clip", overrides={"training.auxiliary_steps": 1, "training.learning_rate": 1e-4})
    whole, parts = (make_trainer(config, tmp_path / name, copy.copy(clip)) for name in ("whole", "parts"))
    check_limited(parts, ["rollout", "decode", "reward", "loss"], log_of(whole), caplog)


def test_a_group_that_does_not_fit_and_must_not_be_cut_ends_the_run_in_one_line(
    tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
):
    trainer = make_trainer(tiny_config("raft", overrides={"algorithm.share": 1.0}), tmp_path)
    monkeypatch.setattr(type(trainer.algorithm), "whole_groups", True)
    loss = Limited(trainer.algorithm, "loss", of_second, room=3)
    with pytest.raises(RunError, match="the update does not fit even with 4 rows that belong together") as raised:
        trainer.run()
    assert loss.calls > 1
    assert len(str(raised.value).splitlines()) == 1
    assert all(p.grad is None for p in trainer.updater.parameters)
