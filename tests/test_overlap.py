"""Images are decoded and scored beside the rollout of the next ones: same results, same errors, nothing left behind."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SMALL

from flowbench.config import RunConfig, resolve_config
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.judges import build_reward
from flowbench.experiments.bench import bench, bench_config
from flowbench.experiments.run import build_algorithm, build_policy
from flowbench.models.memory import Portion
from flowbench.models.presets import load_preset
from flowbench.models.processes import ALONE
from flowbench.prompts import load_split
from flowbench.rollout import RolloutPlan
from flowbench.training.beside import Helper
from flowbench.training.budget import Budget
from flowbench.training.trainer import Trainer

MAIN = threading.main_thread().name
WAIT = 20  # seconds, after which something that should have happened has not


def helpers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("flowbench-helper")]


@pytest.fixture
def in_the_plane(tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer whose iterations of 16 points are sampled by fours and scored by twos, beside each other or not."""

    def make(overlaps: bool = True, **overrides: Any) -> Trainer:
        settings = {**SMALL, "training.rollout_batch": 4, "training.decode_batch": 2, **overrides}
        config = resolve_config("raft", "linear", "gaussian", overrides=settings, device="cpu")
        preset, cpu = load_preset("gaussian"), torch.device("cpu")
        reward, prompts = build_reward("linear", preset, cpu), load_split(preset.prompts, "train").prompts
        policy, algorithm = build_policy(config, preset, cpu), build_algorithm(config, reward)
        trainer = Trainer(config, policy, algorithm, reward, prompts, tmp_path)
        trainer.collector.overlaps = overlaps
        return trainer

    return make


def watched(owner: Any, name: str, before: Callable[..., None]) -> None:
    """Let a method of `owner` call `before` with its arguments first."""
    method = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        before(*arguments)
        return method(*arguments, **options)

    setattr(owner, name, call)


# --- the same results -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [RolloutPlan(keep_steps=True), RolloutPlan(branch_step=1)])
def test_an_iteration_is_the_same_to_the_last_bit_whether_it_is_scored_beside_its_rollout_or_after_it(
    plan: RolloutPlan, tmp_path: Path, tiny_config: Callable[..., RunConfig], make_trainer: Callable[..., Trainer]
):
    settings = {"training.rollout_batch": 5, "training.decode_batch": 3, "training.num_steps": 3}
    config, found = tiny_config("flow-grpo", "jpeg+oracle", overrides=settings), []
    for overlaps in (False, True):
        trainer = make_trainer(config, tmp_path)
        trainer.algorithm.plan = lambda: plan
        trainer.collector.overlaps = overlaps
        threads: set[str] = set()
        for part in trainer.reward.parts().values():
            watched(part, "score", lambda *_, seen=threads: seen.add(threading.current_thread().name))
        found.append(trainer.collector.collect(0, trainer.budget))
        assert (MAIN in threads, len(threads)) == (not overlaps, 1)
        assert trainer.budget.reward_calls == 32
        assert trainer.policy.evaluations.total > 0
    after, beside = found
    assert beside.prompts == after.prompts
    assert beside.components.keys() == after.components.keys()
    for name in ("x0", "images", "reward", "states", "log_prob", "step_mean", "step_std", "sigmas", "group"):
        theirs, ours = getattr(after, name), getattr(beside, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), name
    assert not helpers()


def test_a_run_is_the_same_to_the_last_bit_and_only_its_seconds_differ(in_the_plane: Callable[..., Trainer]):
    weights, budgets = [], []
    for overlaps in (False, True):
        trainer = in_the_plane(overlaps)
        budgets.append(trainer.run())
        weights.append([p.detach().clone() for p in trainer.policy.trainable_parameters()])
    assert all(map(torch.equal, *weights))
    (after, beside) = budgets
    assert after.timings.keys() == beside.timings.keys()
    for counted in ("images", "reward_calls", "evaluations", "updates"):
        assert getattr(after, counted) == getattr(beside, counted)


def test_what_is_scored_is_scored_while_the_next_is_sampled_and_without_gradient(in_the_plane: Callable[..., Trainer]):
    trainer, sampled, second, modes, counts = in_the_plane(), [], threading.Event(), [], []

    def sample(*_: Any) -> None:
        sampled.append(1)
        if len(sampled) == 2:
            second.set()

    def score(*_: Any) -> None:
        modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        assert second.wait(timeout=WAIT)  # which began after the rollout that is scored here
        counts.append(len(sampled))

    watched(trainer.policy, "rollout", sample)
    watched(trainer.reward, "score", score)
    trainer.collector.collect(0, trainer.budget)
    assert set(modes) == {(False, False)}
    assert counts[:2] == [2, 2]  # the third waited for both portions of the first


def test_seconds_of_a_part_are_those_of_its_own_thread_so_that_they_may_sum_to_more_than_the_wall_has(
    in_the_plane: Callable[..., Trainer],
):
    trainer = in_the_plane(**{"training.decode_batch": 4})
    watched(trainer.policy, "rollout", lambda *_: time.sleep(0.1))
    watched(trainer.policy, "decode", lambda *_: time.sleep(0.04))
    watched(trainer.reward, "score", lambda *_: time.sleep(0.04))
    begun = time.perf_counter()
    trainer.collector.collect(0, trainer.budget)
    trainer.budget.seconds = time.perf_counter() - begun
    seconds = trainer.budget.timings
    assert seconds["rollout"] >= 0.4
    assert min(seconds["decode"], seconds["reward"]) >= 0.16
    assert seconds["rollout"] + seconds["decode"] + seconds["reward"] > trainer.budget.seconds
    assert trainer.budget.overhead == 0


def test_the_second_thread_speaks_to_no_other_process(in_the_plane: Callable[..., Trainer]):
    trainer, threads = in_the_plane(), set()

    class Heard:
        """The processes, and which threads ask them anything."""

        def __getattr__(self, name: str) -> Any:
            threads.add(threading.current_thread().name)
            return getattr(ALONE, name)

    trainer.policy.processes = Heard()
    trainer.collector.collect(0, trainer.budget)
    assert threads == {MAIN}


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RunError("no licence"), UsageError("no server"), KeyboardInterrupt(), ValueError("odd"), SystemExit(3)]
)
def test_what_a_reward_raises_reaches_the_run_as_it_does_without_a_second_thread(
    error: BaseException, in_the_plane: Callable[..., Trainer]
):
    told = []
    for overlaps in (False, True):
        trainer = in_the_plane(overlaps)
        calls: list[int] = []

        def fail(*_: Any, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise error

        watched(trainer.reward, "score", fail)
        with pytest.raises(BaseException) as raised:  # noqa: PT011
            trainer.collector.collect(0, trainer.budget)
        told.append((type(raised.value), str(raised.value)))
        assert len(calls) == 3
        assert not helpers()
    assert told[0] == told[1]
    assert issubclass(told[0][0], (RunError, UsageError, KeyboardInterrupt))


def test_a_rollout_that_fails_ends_the_scoring_beside_it_after_the_portion_that_is_at_work(
    in_the_plane: Callable[..., Trainer],
):
    trainer, at_work, failed = in_the_plane(), threading.Event(), threading.Event()
    sampled: list[int] = []
    scored: list[int] = []

    def sample(*_: Any) -> None:
        sampled.append(1)
        if len(sampled) == 2:
            assert at_work.wait(timeout=WAIT)
            failed.set()
            raise RunError("the sampler fails")

    def score(images: torch.Tensor, prompts: Any) -> None:
        scored.append(len(images))
        at_work.set()
        assert failed.wait(timeout=WAIT)
        time.sleep(0.1)  # so that who failed has given up

    watched(trainer.policy, "rollout", sample)
    watched(trainer.reward, "score", score)
    with pytest.raises(RunError, match="the sampler fails"):
        trainer.collector.collect(0, trainer.budget)
    assert scored == [2]
    assert not helpers()


# --- memory -----------------------------------------------------------------------------------------------------------


class Shared:
    """Memory that has room for one of two."""

    def __init__(self) -> None:
        self.taken, self.tried = threading.Event(), threading.Event()
        self.sizes: list[int] = []

    def work(self, rows: slice) -> int:
        self.sizes.append(rows.stop - rows.start)
        self.tried.set()
        if self.taken.is_set():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return rows.stop


@pytest.mark.parametrize("who", ["piece", "main"])
def test_what_fits_alone_is_done_undivided_after_the_other_and_from_then_on_both_take_turns(
    who: str, caplog: pytest.LogCaptureFixture
):
    memory, portion, done = Shared(), Portion("decoding", 4), []
    memory.taken.set()

    def hold() -> None:
        assert memory.tried.wait(timeout=WAIT)
        memory.taken.clear()

    def use(alone: Callable[[], bool]) -> None:
        done.extend(portion.map(memory.work, 4, alone=alone))

    with caplog.at_level(logging.WARNING), Helper() as helper:
        if who == "piece":
            helper.start(lambda: use(helper.piece_alone))
            hold()
        else:
            helper.start(hold)
            use(helper.main_alone)
        helper.wait()
        assert helper.taking_turns
        ended: list[bool] = []
        helper.start(lambda: ended.append(True))
        assert ended  # before main goes on
    assert (memory.sizes, done, portion.size) == ([4, 4], [4], 4)
    assert caplog.messages == ["out of memory: rollouts, and decoding and scoring beside them, take turns from here on"]


@pytest.mark.parametrize("phase", ["rollout", "decode", "score"])
def test_what_does_not_fit_alone_either_is_halved_and_the_iteration_ends_as_ever(
    phase: str, in_the_plane: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
):
    whole = in_the_plane(overlaps=False).collector.collect(0, Budget())
    trainer = in_the_plane(**{"training.decode_batch": 4})
    owner = trainer.reward if phase == "score" else trainer.policy
    failed = []

    def check(*arguments: Any) -> None:
        rows = len(arguments[-1 if phase == "rollout" else 0])
        if rows > 3:
            failed.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    watched(owner, phase, check)
    with caplog.at_level(logging.WARNING):
        rollout = trainer.collector.collect(0, trainer.budget)
    what = {"rollout": "the rollout", "decode": "decoding", "score": "scoring"}[phase]
    assert failed == [4, 4]
    assert caplog.messages == [
        "out of memory: rollouts, and decoding and scoring beside them, take turns from here on",
        f"out of memory: {what} goes on with 2 images at a time instead of 4",
    ]
    assert not trainer.collector.overlaps
    torch.testing.assert_close(rollout.x0, whole.x0)
    torch.testing.assert_close(rollout.reward, whole.reward)
    assert trainer.policy.evaluations.total == 16 * trainer.policy.num_steps


# --- where it is done -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"training.overlap": False}, False),
        ({"training.rollout_batch": None}, False),
        ({"training.rollout_batch": 16}, False),
        ({"training.decode_batch": 16}, False),
        ({"training.offload": True}, False),
    ],
)
def test_it_is_done_on_a_gpu_where_a_rollout_has_parts_and_rewards_stay_there(
    settings: dict[str, Any], expected: bool, in_the_plane: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
):
    def rule(on_gpu: bool) -> bool:
        monkeypatch.setattr("flowbench.training.collect.pays_on", lambda device: on_gpu)
        trainer = in_the_plane(**settings)
        return type(trainer.collector)(
            trainer.config, trainer.policy, trainer.algorithm, trainer.reward, trainer.prompts
        ).overlaps

    assert rule(on_gpu=True) is expected
    assert not rule(on_gpu=False)


@pytest.mark.parametrize("done", [True, False])
def test_the_bench_shows_what_it_brings_where_it_is_done(done: bool, preset_file: str, monkeypatch: pytest.MonkeyPatch):
    if done:
        monkeypatch.setattr("flowbench.training.collect.pays_on", lambda device: True)
    settings = {"training.num_steps": 1, "evaluation.num_steps": 1}
    config = bench_config(preset_file, "raft", "jpeg", "cpu", 8, 1, settings)
    report = bench(config, repeats=1)
    assert (report.overlap is not None) == done
    if report.overlap is not None:
        assert report.overlap.portion == 2
        assert report.as_json()["overlap"]["speedup"] == report.overlap.in_turns / report.overlap.beside > 0
    assert report.rollouts > 0
