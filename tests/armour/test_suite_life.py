"""A suite that crashes anywhere, a disk that is really full, and a run of thousands of iterations."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from test_life import TINY, Crashed, crash_at, left, weights

from flowbench.config import resolve_config
from flowbench.experiments.run import Listener, execute
from flowbench.experiments.study import StudyListener, run_jobs
from flowbench.experiments.suite import all_jobs, load_suite, plan
from flowbench.training.trainer import IterationLog

WORKLOAD = {"model": "gaussian", "reward": "linear", "images": TINY["training.images"]}
RUNS = [{"workloads": ["tiny.yaml"], "algorithms": ["nft"], "seeds": {"first": 0, "count": 2}}]


@pytest.fixture(scope="module", autouse=True)
def without_git() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowbench.experiments.outcome.code_commit", lambda: None)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of two runs of six iterations on the plane."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(WORKLOAD), encoding="utf-8")
    settings = {key: value for key, value in TINY.items() if key != "training.images"}
    (folder / "two.yaml").write_text(yaml.safe_dump({"runs": RUNS, "settings": settings}), encoding="utf-8")
    return folder / "two.yaml"


def make(suite: Path, output: Path) -> None:
    run_jobs(all_jobs(plan(load_suite(str(suite)), output, "cpu")), StudyListener())


def results(output: Path) -> dict[str, Any]:
    """Records, logs, points and weights of a suite's runs, timings aside."""
    folders = sorted(path.parent for path in output.rglob("DONE"))
    assert len(folders) == 2
    said = {folder.name: left(folder) for folder in folders}
    return {
        name: {**content, "weights": [w.tolist() for w in weights(folder)]}
        for (name, content), folder in zip(said.items(), folders, strict=True)
    }


def crashes(suite: Path, tmp_path: Path, step: int, moment: str) -> int:
    """Crash a suite at every `step`-th of its writes and repeat the command; how many writes it has."""
    make(suite, tmp_path / "whole")
    whole = results(tmp_path / "whole")
    k = 1
    while True:
        output = tmp_path / f"{moment}-{k}"
        with crash_at(k, moment) as written, suppress(Crashed):
            make(suite, output)
        if len(written) < k:
            return len(written)
        make(suite, output)
        assert results(output) == whole, k
        k += step


def test_a_suite_that_crashes_at_a_write_is_continued_to_the_same_results(suite: Path, tmp_path: Path):
    assert crashes(suite, tmp_path, 17, "torn") > 34


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "torn", "after"])
def test_a_suite_that_crashes_at_any_write_is_continued_to_the_same_results(moment: str, suite: Path, tmp_path: Path):
    assert crashes(suite, tmp_path, 1, moment) > 34


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("free", range(0, 240, 16))
def test_a_disk_that_is_really_full_costs_no_whole_checkpoint_and_is_one_line(free: int, small_disk: Path):
    settings = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "flowbench", "run", "nft", "--model", "gaussian", "--reward", "linear"]
    command += [*settings, "--device", "cpu", "--output", str(small_disk / "runs")]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, check=False, timeout=120)

    block = small_disk / "block"
    block.write_bytes(bytes(2**20 - free * 1024 - 8192))
    done = run()
    lines = done.stderr.splitlines()
    if done.returncode == 0:  # there was room for all of it but pictures, which are no part of a result
        assert all("cannot be" in line or "picture" in line for line in lines), lines
    else:
        assert done.returncode in (1, 2)
        errors = [line for line in lines if line.startswith("flowbench: ")]
        assert len(errors) == 1, lines
        assert "Traceback" not in done.stderr
        assert "disk is full" in errors[0] or "No space left" in errors[0]
    block.unlink()
    again = run("--resume")
    if again.returncode == 2:  # there was not even room for a beginning
        again = run()
    assert again.returncode == 0, again.stderr
    (folder,) = (path.parent for path in small_disk.rglob("DONE"))
    left(folder)


# --- soak -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_stays_as_it_is_over_two_thousand_iterations(preset_file: str, tmp_path: Path):
    settings = {
        "training.images": 8000,
        "training.prompts_per_iteration": 2,
        "training.images_per_prompt": 2,
        "training.minibatch": 4,
        "training.num_steps": 2,
        "training.checkpoint_every": 100,
        "evaluation.prompts": 2,
        "evaluation.images_per_prompt": 2,
        "evaluation.splits": ["test"],
        "evaluation.judges": [],
        "evaluation.points": 0,
    }
    config = resolve_config("nft", "jpeg", preset_file, overrides=settings, device="cpu")
    process, memory = psutil.Process(), {}

    def look(log: IterationLog) -> None:
        if log.iteration % 100 == 0:
            memory[log.iteration] = process.memory_info().rss

    execute(config, tmp_path / "run", "", False, Listener(on_iteration=look))
    print({iteration: rss >> 20 for iteration, rss in memory.items()})
    assert len(memory) == 20
    assert memory[2000] < 1.02 * memory[200]
