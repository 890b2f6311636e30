"""One run shared by two processes, over gloo on this machine's CPU."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shared_runs
import torch
from shared_runs import CASES, HALF

import flowbench
from flowbench.config import TrainingConfig
from flowbench.errors import UsageError
from flowbench.experiments.study import StudyListener, run_jobs
from flowbench.models.processes import ALONE, Processes
from flowbench.registry import algorithms
from flowbench.rollout import Batch, Conditioning
from flowbench.training.checkpoint import CHECKPOINT
from flowbench.training.processes import check_division, own_rows
from flowbench.training.state import load_state

Said = list[dict[str, str]]  # what each process said, by the name of what it did


def together(root: Path) -> list[tuple[int, str]]:
    """Start shared_runs.py twice, as a launcher does; exit status and output of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    both = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "shared_runs.py"), str(root)],
            env={**os.environ, **place, "WORLD_SIZE": "2", "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    return [(process.returncode, output) for process, output in zip(both, outputs, strict=True)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes left."""
    root = tmp_path_factory.mktemp("shared")
    shared_runs.save_pipeline(root)
    shared_runs.stop_after_one("acflow", root, root / "stopped alone")
    (root / "out.json").write_text(json.dumps(together(root)), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def said(root: Path) -> Said:
    """What each process said of its interruption and failures."""
    (_, main), (_, other) = json.loads((root / "out.json").read_text(encoding="utf-8"))
    assert (root / "said-1.json").exists(), main + other
    return [json.loads((root / f"said-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Of all numbers together, relative to their length."""
    a, b = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (one, other))
    return float((a - b).norm() / a.norm())


def assert_same(alone: dict[str, Any], shared: dict[str, Any]) -> None:
    assert distance(alone["current"], shared["current"]) < 1e-5
    assert distance(alone["average"], shared["average"]) < 1e-5
    if alone["networks"]:
        assert distance(alone["networks"], shared["networks"]) < 1e-4  # in single precision
    assert alone["spent"] == shared["spent"]


def test_the_cases_are_of_all_algorithms():
    assert {case.algorithm for case in CASES.values() if case.model == "gaussian"} == {*algorithms.names()}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_update_of_one(
    name: str, root: Path, said: Said, tmp_path: Path, read_log: Callable[[Path], list[dict[str, Any]]]
):
    alone = shared_runs.train(name, root, tmp_path)
    assert_same(alone, load_state(root / "shared" / name / "state"))
    for one, two in zip(read_log(tmp_path), read_log(root / "shared" / name), strict=True):
        assert one["reward"] == pytest.approx(two["reward"], rel=1e-5)
        assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", HALF)
def test_two_processes_train_a_lora_in_half_precision_beside_t5(name: str, root: Path, said: Said, tmp_path: Path):
    trainer = shared_runs.make_trainer(HALF[name], root, tmp_path, ALONE)
    before = [p.detach().clone() for p in trainer.updater.parameters]
    trainer.run()
    alone, shared = shared_runs.state(trainer), load_state(root / "shared" / name / "state")
    moves = [[a - b for a, b in zip(run["current"], before, strict=True)] for run in (alone, shared)]
    assert any(move.any() for move in moves[0])
    assert distance(*moves) < 0.05  # a gradient near 0 may change its sign by rounding, and its step with it
    assert alone["spent"] == shared["spent"]


def test_a_run_continues_with_another_number_of_processes(root: Path, said: Said):
    whole = load_state(root / "shared" / "acflow" / "state")
    assert_same(whole, load_state(root / "shared" / "resumed"))  # begun by one, continued by two
    assert_same(whole, shared_runs.resume("acflow", root, root / "stopped together"))


def test_an_interrupt_of_one_process_ends_all_after_the_same_iteration(said: Said):
    for each in said:
        assert "interrupted after iteration 1 of 2" in each["interrupted"]


def test_two_processes_give_the_scores_of_one(root: Path, said: Said):
    alone, shared = shared_runs.evaluate(root), load_state(root / "shared" / "evaluated")
    for metric, scores in alone.scores.items():
        torch.testing.assert_close(shared["scores"][metric], torch.from_numpy(scores), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared["grid"], alone.grid)


def test_a_failure_in_one_process_ends_all_by_its_words_with_everything_saved(root: Path, said: Said):
    for each in said:
        assert each["failed"].startswith("PeerError: process 1 of 2: reward 'unsteady' is nan for the prompt")
    assert load_state(root / "failed" / CHECKPOINT)["iteration"] == 1


def test_weights_that_differ_between_processes_end_the_run(said: Said):
    assert said[0]["differs"].startswith("RunError: after iteration 1 the weights of process 1 are not those of")
    assert said[1]["differs"].startswith("PeerError")


def test_a_process_that_vanishes_leaves_no_other_waiting(root: Path, said: Said):
    (status, output), (vanished, _) = json.loads((root / "out.json").read_text(encoding="utf-8"))
    assert (status, vanished) == (0, 9)
    assert re.search(r"^process 0 of 2 lost the others \(.+\); see what the one that ended first says", output, re.M)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("whole_groups", [False, True])
def test_every_row_of_a_minibatch_is_in_one_process(count: int, whole_groups: bool):
    group = torch.tensor([3, 3, 3, 0, 0, 1, 1, 1, 1, 7, 2, 2])
    cond = Conditioning({}, torch.zeros(12, dtype=torch.int64))
    batch = Batch(("a",) * 12, cond, torch.zeros(12, 1), torch.zeros(12), group=group)
    shares = [own_rows(Processes(rank, count), batch, whole_groups) for rank in range(count)]
    assert torch.cat(shares).tolist() == list(range(12))
    owner = torch.cat([torch.full((len(share),), rank) for rank, share in enumerate(shares)])
    sizes = [len(share) for share in shares]
    if whole_groups:
        assert all(len(owner[group == g].unique()) == 1 for g in group.unique())
    else:
        assert max(sizes) - min(sizes) <= 1


def test_noise_of_a_share_is_that_of_all_and_leaves_the_generator_the_same():
    def numbers(processes: Processes) -> tuple[torch.Tensor, ...]:
        generator, mine = torch.Generator().manual_seed(3), processes.share(3)
        with processes.drawing(mine, 3):
            together = processes.randn((len(mine), 2, 5), generator)  # before the images of a prompt part
            apart = processes.randn((4 * len(mine), 2, 5), generator)
        return together, apart, processes.randn((6,), generator)

    everyone, one, two = numbers(ALONE), numbers(Processes(0, 2)), numbers(Processes(1, 2))
    assert torch.equal(torch.cat([one[0], two[0]]), everyone[0])
    assert torch.equal(torch.cat([one[1], two[1]]), everyone[1])
    assert torch.equal(one[2], everyone[2])
    assert torch.equal(two[2], everyone[2])


def test_one_process_is_given_back_what_it_gave():
    x, parameter = torch.randn(3), torch.nn.Parameter(torch.randn(2))
    assert ALONE.gather(x) is x
    assert ALONE.objects("a", "here") == ["a"]
    assert ALONE.from_main("b") == "b"
    assert ALONE.total((1, 2)) == [1, 2]
    assert ALONE.add_gradients([parameter], 5) == [5]
    assert parameter.grad is None


def test_more_processes_than_prompts_are_refused():
    with pytest.raises(UsageError, match=r"17 processes cannot share training\.prompts_per_iteration=16"):
        check_division(Processes(0, 17), TrainingConfig())


@pytest.mark.parametrize("command", [["ablate", "acflow"], ["list", "models"], ["check", "--all"]])
def test_commands_other_than_run_are_for_one_process(
    command: list[str], flowbench_main: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert flowbench_main(*command) == 2
    assert capsys.readouterr().err.startswith(f"flowbench: 'flowbench {command[0]}' is for one process, and 2 were")


def test_a_study_is_for_one_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="a study of many runs is for one process"):
        run_jobs([], StudyListener())


def test_processes_that_were_not_told_where_to_meet_are_a_line(
    flowbench_main: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert flowbench_main("run", "raft", "--model", "gaussian", "--reward", "linear", "--device", "cpu") == 2
    line = "flowbench: WORLD_SIZE is 2, but RANK is not set; start with accelerate launch or torchrun"
    assert line in capsys.readouterr().err


def test_accelerate_launch_makes_a_run_that_is_printed_and_written_once(
    tmp_path: Path, settings: Callable[..., list[str]]
):
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch += " --num_cpu_threads_per_process 1"
    run = ["run", "raft", "--model", "gaussian", "--reward", "linear", "--device", "cpu"]
    run += [*settings(evaluation__points=2), "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "-m", "flowbench", *run],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("raft on linear, gaussian, seed 0: 2 iterations") == 1
    assert done.stdout.count("record.json") == 1
    (record,) = flowbench.load_records(tmp_path)
    assert record.device == "cpu x 1, 2 processes"
    assert record.budget.images == 32
    assert [point.images for point in record.points] == [16, 32]
    assert record.points[-1].scores["kl"] == record.scores["kl/test"].tuned
    for log, lines in (("metrics.jsonl", 2), ("points.jsonl", 3)):
        assert len(next(tmp_path.rglob(log)).read_text(encoding="utf-8").splitlines()) == lines
