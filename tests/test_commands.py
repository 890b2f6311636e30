"""Every command of the command line in a process of its own, with arguments that work and with some that do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from flowbench.cli import main as cli

TINY = ["training.images_per_prompt=4", "evaluation.prompts=2", "evaluation.images_per_prompt=2"]
RUN = ["run", "raft", "--model", "gaussian", "--reward", "linear", "--images", "64", "--device", "cpu"]
RUN += [part for setting in TINY for part in ("--set", setting)]

PLUGIN = '''
from flowbench import register_reward


@register_reward("boxed", source="tests", licence="none", range=(0.0, 1.0), differentiable=False,
                 requirements=["{requirement}"])
class Boxed:
    """Lives in an environment of its own."""
'''


@dataclass(frozen=True)
class Case:
    """A command's arguments that work, and what they print; arguments that fail, and how.

    works None: needs what a test cannot have. until: a file or a line after which the command is interrupted, because
    it goes on for hours or for ever.
    """

    works: list[str] | None
    prints: str
    fails: list[str]
    status: int
    complaint: str
    until: str = ""


# {place} has what the fixture `place` makes; {run} is a finished run.
CASES = {
    "run": Case(["raft", "--dry-run"], "2880 training images", ["acflw"], 2, "did you mean 'acflow'"),
    "evaluate": Case(["{run}", "--output", "scores.json"], "reward", ["absent"], 2, "'absent' does not exist"),
    "sample": Case(["{run}", "a point", "--images", "2"], "a-point-0.png", ["absent", "x"], 2, "does not exist"),
    "list": Case(["rewards"], "jpeg", ["algoritms"], 2, "did you mean 'algorithms'"),
    "leaderboard": Case(["{run}"], "raft", ["absent"], 2, "'absent' does not exist"),
    "page": Case(
        ["{run}", "--output", "page.html"], "page.html", ["{run}", "--samples", "absent"], 2, "does not exist"
    ),
    # What it takes is made by a clean checkout: tests/test_submit.py.
    "submit": Case(None, "", ["absent"], 2, "'absent' does not exist"),
    "ablate": Case(
        ["acflow", "--model", "gaussian", "--reward", "linear", "--seeds", "1", "--dry-run"],
        "algorithm.alpha=0.0",
        ["acflow", "--format", "pdf"],
        2,
        "unknown format 'pdf'",
    ),
    "compare": Case(
        [
            *("raft", "nft", "--model", "gaussian", "--rewards", "linear", "--seeds", "1", "--images", "64"),
            *(part for setting in TINY for part in ("--set", setting)),
        ],
        "raft",
        ["raft"],
        2,
        "name two or more different algorithms",
    ),
    "tune": Case(
        ["raft", "--workload", "plane-linear", "--trials", "2", "--dry-run"],
        "trials: 2; the rules have 20",
        ["raft", "--sampler", "grid"],
        2,
        "unknown sampler 'grid'",
    ),
    "suite run": Case(["rehearsal", "--dry-run"], "in 24 runs", ["rehersal"], 2, "did you mean 'rehearsal'"),
    "suite show": Case(["rehearsal"], "24 missing", ["absent.yaml"], 2, "'absent.yaml' is not a suite"),
    "check": Case(["jpeg"], "pass", ["jpge"], 2, "did you mean 'jpeg'"),
    "probe": Case(
        ["draft", "--model", "gaussian", "--reward", "linear", "--batches", "3"],
        "true gradient through",
        ["raft", "--reward", "jpeg"],
        2,
        "reward 'jpeg' has none, use for example 'clip'",
    ),
    "bench": Case(
        [
            "--random-init",
            "--images",
            "4",
            "--repeats",
            "1",
            "--set",
            "training.num_steps=1",
            "--set",
            "evaluation.num_steps=1",
        ],
        "of matmul",
        ["--images", "5"],
        2,
        "must be a multiple of 4",
    ),
    "doctor": Case([], "device", ["--absent"], 2, "No such option"),
    "testbed build": Case(
        ["--only", "clip", "--work", "work", "--output", "built"],
        "",
        ["--only", "clap"],
        2,
        "did you mean 'clip'",
        until="work/tokenizer/tokenizer.json",
    ),
    "testbed show": Case(["--output", "world.png"], "world.png", ["--seed", "-1"], 2, "Invalid value for '--seed'"),
    "testbed path": Case(["mini-sd3"], "mini-sd3", ["mini-sd"], 2, "did you mean 'mini-sd3'"),
    "rewards list": Case([], "imagereward-package", ["--plugin", "absent.py"], 2, "does not exist"),
    "rewards install": Case(["boxed", "--plugin", "{place}/boxed.py"], "boxed", ["jpeg"], 2, "needs no environment"),
    "rewards remove": Case(["--all"], "", [], 2, "name the rewards"),
    "rewards convert": Case(["{place}/w.pt", "w.safetensors"], "1 tensors", [], 2, "Missing argument"),
    # It needs the packages of image-reward or hpsv2, which come over a network.
    "rewards parity": Case(
        None, "", ["hpsv2", "--reduced"], 1, "the environment of reward 'hpsv2-package' is not inst"
    ),
    "rewards serve": Case(
        ["jpeg", "--port", "0", "--device", "cpu"],
        "jpeg at http://127.0.0.1",
        ["jpeg", "--port", "65536"],
        2,
        "Invalid value for '--port'",
        until="FLOWBENCH_REWARD_TOKEN=",
    ),
}


def start(folder: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """The command line in a process of its own, in a folder of its own."""
    environment = {
        **os.environ,
        "COLUMNS": "200",
        "FLOWBENCH_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "flowbench", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()  # nothing outlives its test
    return process.returncode, output, errors


def commands(group: Any, *names: str) -> Iterator[str]:
    """The names of all commands below a group, in words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield " ".join((*names, name))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pickle of weights, and a plug-in with the package that it requires."""
    folder = tmp_path_factory.mktemp("place")
    torch.save({"w": torch.ones(2)}, folder / "w.pt")
    wheel, info = folder / "tinybox-1.0-py3-none-any.whl", "tinybox-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinybox\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (folder / "boxed.py").write_text(PLUGIN.format(requirement=f"tinybox @ {wheel.as_uri()}"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("run")
    status, _, errors = finish(start(folder, RUN))
    assert status == 0, errors
    (record,) = folder.rglob("record.json")
    return record.parent


def spelled(name: str, arguments: list[str], place: Path, request: pytest.FixtureRequest) -> list[str]:
    """The words after `flowbench`; the finished run is made only for who asks for it."""
    run = request.getfixturevalue("run_folder") if "{run}" in arguments else None
    return [*name.split(), *(word.format(place=place, run=run) for word in arguments)]


def test_every_command_stands_here():
    assert set(commands(typer.main.get_command(cli.app))) == set(CASES)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.works is not None and not case.until])
def test_a_command_works_in_a_process_of_its_own(
    name: str, tmp_path: Path, place: Path, request: pytest.FixtureRequest
):
    case = CASES[name]
    status, output, errors = finish(start(tmp_path, spelled(name, case.works or [], place, request)))
    assert status == 0, errors
    assert case.prints in output
    assert "Traceback" not in errors


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.until])
def test_a_command_without_an_end_can_be_interrupted(
    name: str, tmp_path: Path, place: Path, request: pytest.FixtureRequest
):
    case = CASES[name]
    process = start(tmp_path, spelled(name, case.works or [], place, request))
    assert process.stdout is not None
    seen = ""
    deadline = time.monotonic() + 60
    if case.until.endswith("="):
        while case.until not in seen and time.monotonic() < deadline:
            seen += process.stdout.readline()
    else:
        wait_for(lambda: (tmp_path / case.until).exists() or process.poll() is not None, deadline)
    process.send_signal(signal.SIGINT)
    status, output, errors = finish(process)
    assert status == 130, errors
    assert case.prints in seen + output
    assert errors == "flowbench: interrupted\n"


def wait_for(condition: Callable[[], bool], deadline: float) -> None:
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.parametrize("name", CASES)
def test_a_command_refuses_what_it_cannot_do_in_one_line(
    name: str, tmp_path: Path, place: Path, request: pytest.FixtureRequest
):
    case = CASES[name]
    status, output, errors = finish(start(tmp_path, spelled(name, case.fails, place, request)))
    assert status == case.status, errors
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("flowbench: ")
    assert case.complaint in errors
    assert "Traceback" not in output


def test_help_tells_of_every_group_and_command():
    for group in ("", "testbed", "rewards"):
        status, output, errors = finish(start(Path(), [*group.split(), "--help"]))
        assert status == 0, errors
        for name in CASES:
            if name.startswith(group):
                assert name.removeprefix(group).split()[0] in output
