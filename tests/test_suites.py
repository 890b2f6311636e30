"""Suites: what they run, and that it is the same whoever runs it and however often it is interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import yaml

from flowbench.config import resolve_config
from flowbench.errors import NotApplicableError, UsageError
from flowbench.experiments import run
from flowbench.experiments.executors import DIED, make_executor
from flowbench.experiments.executors.local import LocalExecutor
from flowbench.experiments.jobs import Job, kept_failure
from flowbench.experiments.study import StudyListener, run_jobs
from flowbench.experiments.suite import Cell, all_jobs, load_suite, plan, suite_names
from flowbench.locks import locked
from flowbench.record import find_records, load_record
from flowbench.registry import algorithms, load_plugin_file
from flowbench.workloads import Workload, load_workload, workload_names

Main = Callable[..., int]
PLAIN = {"model": "gaussian", "reward": "linear", "images": 64}
EVALUATION = {"splits": ["test"], "prompts": 2, "images_per_prompt": 4}
# And the commit: somebody may be at work on the tree.
TIMINGS = {
    "checksum",
    "commit",
    "seconds",
    "evaluation_seconds",
    "overhead",
    "peak_memory_mb",
    "finished",
    "base_cached",
}

# Pictures are most of what a tiny run takes, and no part of a record.
QUICK = """
from flowbench import register_algorithm
from flowbench.algorithms.raft import Raft
from flowbench.experiments import run

run.draw = run.draw_study = lambda *_: None


@register_algorithm("quick", paper="tests", needs={"endpoint"})
class Quick(Raft):
    "Raft without pictures."
"""

DOOMED = """
import os, signal
from flowbench import register_algorithm
from flowbench.algorithms.raft import Raft


@register_algorithm("doomed", paper="tests", needs={"endpoint"})
class Doomed(Raft):
    "Fails as it is told."

    class Config(Raft.Config):
        way: str = "none"

    def prepare(self, rollout):
        if self.cfg.way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.cfg.way == "raised":
            raise ValueError("[/] two" + chr(10) + "lines")
        return super().prepare(rollout)
"""


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The plug-in file of `quick`; runs of this process draw no pictures either, until the module's end."""
    path = tmp_path_factory.mktemp("quick") / "quick.py"
    path.write_text(QUICK, encoding="utf-8")
    drawing = {name: getattr(run, name) for name in ("draw", "draw_study")}
    load_plugin_file(path)
    yield path
    algorithms.loaded.pop("quick")
    for name, function in drawing.items():
        setattr(run, name, function)


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def tiny_suite(folder: Path, seeds: int = 3, plugins: Sequence[Path] = ()) -> Path:
    """A suite of runs in the plane that take a second; workers need the plug-in of `quick`."""
    write(folder / "tiny.yaml", {"evaluation": EVALUATION, **PLAIN, "images": 256})
    settings = {"training.images_per_prompt": 4, "training.minibatch": 64, "training.checkpoint_every": 1}
    settings |= {"training.num_steps": 8, "evaluation.num_steps": 8}
    runs = [{"workloads": ["tiny.yaml"], "algorithms": ["quick", "nft"], "seeds": {"first": 5, "count": seeds}}]
    return write(folder / "suite.yaml", {"settings": settings, "runs": runs, "plugins": list(map(str, plugins))})


def planned(suite: Path, output: Path) -> list[Cell]:
    return plan(load_suite(str(suite)), output, "cpu")


def results(output: Path) -> dict[str, Any]:
    """Records and logs of all runs, timings aside, by their folders."""
    found: dict[str, Any] = {}
    for path in sorted(output.rglob("record.json")):
        lines = (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        record = json.loads(path.read_text(encoding="utf-8"))
        found[path.parent.relative_to(output).as_posix()] = timeless([record, *map(json.loads, lines)])
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items() if key not in TIMINGS}
    return [timeless(v) for v in value] if isinstance(value, list) else value


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As workers of one core have it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(quick: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A suite's file, and what its runs leave when this process makes one after another."""
    folder = tmp_path_factory.mktemp("undisturbed")
    suite = tiny_suite(folder, plugins=[quick])
    with one_thread():
        outcomes = run_jobs(all_jobs(planned(suite, folder / "runs")), StudyListener())
    assert [outcome.failure for outcome in outcomes] == [None] * 6
    return suite, results(folder / "runs")


def start_suite(suite: Path, output: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flowbench", "suite", "run", str(suite), "--device", "cpu", *arguments]
    with (output.parent / "log.txt").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, "--output", str(output)], stdout=log, stderr=log, text=True, start_new_session=True
        )


def kill_and_repeat(suite: Path, output: Path, kills: int, seed: int, *arguments: str) -> None:
    """Run a suite, kill its whole process group at random moments, and repeat it until it has ended by itself."""
    chance = random.Random(seed)
    for _ in range(kills):
        process = start_suite(suite, output, *arguments)
        before, ahead = progress(output), chance.randint(1, 6)
        while process.poll() is None and progress(output) < before + ahead:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = start_suite(suite, output, *arguments)
    try:
        assert process.wait(timeout=300) == 0, (output.parent / "log.txt").read_text(encoding="utf-8")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_suite_that_is_terminated_saves_what_its_workers_did_and_leaves_none_behind(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
):
    suite, expected = undisturbed
    process = start_suite(suite, tmp_path / "runs", "--jobs", "2")
    while process.poll() is None and progress(tmp_path / "runs") < 3:
        time.sleep(0.01)
    process.terminate()  # the parent alone
    assert process.wait(timeout=120) == 143
    assert ended(process.pid)
    assert "flowbench: interrupted; finished runs are kept" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    kill_and_repeat(suite, tmp_path / "runs", 0, 0)
    assert results(tmp_path / "runs") == expected


def ended(group: int) -> bool:
    """Whether all processes of a group end within some seconds."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def progress(output: Path) -> int:
    """Iterations and records of all runs."""
    with contextlib.suppress(OSError):  # folders come and go
        logs = [path.read_bytes() for path in output.rglob("metrics.jsonl")]
        return sum(log.count(b"\n") for log in logs) + len(list(output.rglob("record.json")))
    return 0


def test_a_suite_killed_at_random_moments_and_repeated_leaves_the_records_of_an_undisturbed_one(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
):
    suite, expected = undisturbed
    kill_and_repeat(suite, tmp_path / "runs", 2, 0)
    assert results(tmp_path / "runs") == expected
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "6 done, 0 running, 0 interrupted, 0 failed, 0 missing" in log
    assert "runs/h" in log
    assert " left" in log


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_suite_of_24_runs_killed_ten_times_leaves_the_records_of_an_undisturbed_one(
    executor: str, quick: Path, tmp_path: Path
):
    suite = tiny_suite(tmp_path, seeds=12, plugins=[quick])
    with one_thread():
        run_jobs(all_jobs(planned(suite, tmp_path / "undisturbed")), StudyListener())
    kill_and_repeat(suite, tmp_path / "runs", 10, 1, "--jobs", "2", "--executor", executor)
    assert len(results(tmp_path / "runs")) == 24
    assert results(tmp_path / "runs") == results(tmp_path / "undisturbed")


def elsewhere(suite: Path, plugin: Path, output: Path, executor: Any, count: int) -> tuple[list[str], list[str]]:
    """Make a suite's first runs by an executor; labels of those that were at work and of those that ended."""
    seen: list[str] = []
    ended: list[str] = []
    listener = StudyListener(
        on_training=lambda job, done, total: seen.append(job.label),
        on_outcome=lambda outcome, done, total: ended.append(outcome.job.label),
    )
    jobs = all_jobs(planned(suite, output))[:count]
    outcomes = run_jobs(jobs, listener, plugins=[plugin], executor=executor)
    assert [(outcome.job, outcome.failure) for outcome in outcomes] == [(job, None) for job in jobs]
    return seen, ended


def test_ray_leaves_the_same_records(undisturbed: tuple[Path, dict[str, Any]], quick: Path, tmp_path: Path):
    pytest.importorskip("ray")
    suite, expected = undisturbed
    seen, ended = elsewhere(suite, quick, tmp_path / "runs", make_executor("ray", 1), 2)
    assert set(seen) <= set(ended)
    made = results(tmp_path / "runs")
    assert len(made) == 2
    assert made == {folder: expected[folder] for folder in made}


def test_submitit_leaves_the_same_records(undisturbed: tuple[Path, dict[str, Any]], quick: Path, tmp_path: Path):
    pytest.importorskip("submitit")
    suite, expected = undisturbed
    executor = make_executor("slurm", 2, logs=tmp_path / "logs", options={"cluster": "local", "timeout_min": "5"})
    elsewhere(suite, quick, tmp_path / "runs", executor, 2)
    made = results(tmp_path / "runs")
    assert len(made) == 2
    assert made == {folder: expected[folder] for folder in made}


class Told:
    """An executor that makes nothing and says what it is told to."""

    def __init__(self, *failures: str | None) -> None:
        self.failures, self.asked = failures, list[str]()

    def carry_out(self, jobs: Sequence[Job], plugins: Any, running: Any) -> Iterator[tuple[Job, str | None]]:
        self.asked += [job.label for job in jobs]
        yield from zip(jobs, self.failures, strict=True)


def test_a_failed_run_is_a_result_that_is_kept_and_made_again_only_when_asked(tmp_path: Path):
    jobs = all_jobs(planned(tiny_suite(tmp_path, seeds=1), tmp_path / "runs"))
    first = run_jobs(jobs, StudyListener(), executor=Told("no [/] memory", "NaN"), retry_failed=False)
    assert [outcome.failure for outcome in first] == ["no [/] memory", "NaN"]
    records = find_records([tmp_path / "runs"])
    assert {(r.algorithm, r.status, r.failure) for r in records} == {
        ("quick", "failed", "no [/] memory"),
        ("nft", "failed", "NaN"),
    }
    assert [job.state for job in jobs] == ["failed", "failed"]
    untouched = Told()
    assert run_jobs(jobs, StudyListener(), executor=untouched, retry_failed=False) == first
    assert untouched.asked == []
    again = Told("still", "still")
    run_jobs(jobs, StudyListener(), executor=again)
    assert again.asked == [job.label for job in jobs]
    assert kept_failure(jobs[0]) == "still"


def test_a_run_that_left_no_record_is_a_failure(tmp_path: Path):
    jobs = all_jobs(planned(tiny_suite(tmp_path, seeds=1), tmp_path / "runs"))
    outcomes = run_jobs(jobs, StudyListener(), executor=Told(None, None))
    assert [o.failure for o in outcomes] == [
        "it left no record; is its folder on a file system that all machines share?"
    ] * 2


def test_a_worker_that_dies_or_raises_costs_its_own_run_alone(clean_registry: None, quick: Path, tmp_path: Path):
    plugin = tmp_path / "doomed.py"
    plugin.write_text(DOOMED, encoding="utf-8")
    load_plugin_file(plugin)
    jobs = []
    for way in ("killed", "raised", "none"):
        suite = tiny_suite(tmp_path)
        content = yaml.safe_load(suite.read_text(encoding="utf-8"))
        content["settings"] |= {"algorithm.way": way, "training.images": 64}
        content["runs"][0] |= {"algorithms": ["doomed"], "seeds": [0]}
        jobs += all_jobs(planned(write(suite, content), tmp_path / "runs"))
    executor = LocalExecutor(1)
    outcomes = run_jobs(jobs, StudyListener(), plugins=[plugin, quick], executor=executor, retry_failed=False)
    died, raised, none = (outcome.failure for outcome in outcomes)
    assert (died, none) == (DIED, None)
    assert raised is not None
    assert raised.startswith("algorithm 'doomed' fails in prepare (")
    assert raised.endswith("doomed.py:18): ValueError: [/] two")
    assert [job.state for job in jobs] == ["failed", "failed", "done"]


def test_workers_have_cores_of_their_own_and_take_turns_at_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-a")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 2, 5, 6, 7}, raising=False)
    shared = LocalExecutor(3, cores=None, gpus=1).places()
    assert [sorted(place.cores or ()) for place in shared] == [[1], [2], [5]]
    assert [place.gpu for place in shared] == ["3", "GPU-a", "3"]
    assert [sorted(p.cores or ()) for p in LocalExecutor(2, 2).places()] == [[1, 2], [5, 6]]
    assert [(p.cores, p.threads) for p in LocalExecutor(3, 2).places()] == [(None, 2)] * 3
    assert LocalExecutor(1).places()[0].cores is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"name": "slrum"}, "unknown executor 'slrum'; did you mean 'slurm'"),
        ({"name": "local", "options": {"partition": "gpu"}}, "--slurm is for --executor slurm"),
        ({"name": "slurm"}, "no Slurm on this machine"),
    ],
)
def test_an_executor_that_cannot_be_had_is_a_line(
    arguments: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=complaint):
        make_executor(**arguments)


def test_an_option_that_slurm_does_not_have_is_a_line(tmp_path: Path):
    pytest.importorskip("submitit")
    executor = make_executor("slurm", logs=tmp_path, options={"cluster": "local", "slurm_wings": "2", "nodes": "2"})
    with pytest.raises(UsageError, match=r"--slurm: .*; the names are submitit's"):
        next(executor.carry_out([], [], lambda job: None), None)


@pytest.mark.parametrize("name", workload_names())
def test_every_algorithm_can_be_run_on_a_built_in_workload_or_is_not_applicable(name: str):
    workload = load_workload(name)
    assert (workload.name, workload.version) == (name, 1)
    refused = set()
    for algorithm in algorithms.names():
        try:
            config = resolve_config(algorithm, workload.reward, workload.model, overrides=workload.overrides())
        except NotApplicableError:
            refused.add(algorithm)
        else:
            assert config.training.images == workload.images
    assert refused == ({"draft", "refl"} if name == "shapes-oracle" else set())


def test_a_workloads_hash_is_of_what_is_run_and_not_of_target_or_summary(tmp_path: Path):
    plain = Workload(name="w", **PLAIN)
    same = {"summary": "text", "target": {"metric": "reward", "gains": [0.1], "diversity": 0.9}}
    assert Workload(name="w", **PLAIN, **same).hash == plain.hash
    others = [
        {"images": 65},
        {"reward": "quadratic"},
        {"version": 2},
        {"evaluation": EVALUATION},
        {"prompts": "points"},
    ]
    assert len({plain.hash, *(Workload(**{"name": "w", **PLAIN, **other}).hash for other in others)}) == 6
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "points.txt").write_text("a point\nanother\n", encoding="utf-8")
        write(tmp_path / folder / "w.yaml", {**PLAIN, "prompts": "points.txt"})
    one, other = (load_workload(f"{folder}/w.yaml", tmp_path) for folder in ("a", "b"))
    assert one.prompts != other.prompts
    assert one.hash == other.hash


WRONG = [
    ({}, "not a workload: 'model': field required"),
    ({**PLAIN, "image": 3}, "'image', which is unknown"),
    ({**PLAIN, "name": "../x"}, "'name': string should match"),
    ({**PLAIN, "evaluation": {"prompt": 3}}, "unknown setting 'prompt'; did you mean 'prompts'"),
    ({**PLAIN, "reward": "liner"}, "unknown reward 'liner'; did you mean 'linear'"),
    ({**PLAIN, "prompts": "absent.txt"}, "unknown prompt set 'absent.txt'"),
]


@pytest.mark.parametrize(("content", "complaint"), WRONG)
def test_a_file_that_is_no_workload_is_a_line(content: dict[str, Any], complaint: str, tmp_path: Path):
    write(tmp_path / "w.yaml", content)
    with pytest.raises(UsageError, match=complaint) as refused:
        load_workload("w.yaml", tmp_path)
    assert "\n" not in str(refused.value)


RUNS = [{"workloads": ["plane-linear"], "algorithms": ["raft"], "seeds": [1, 2]}]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({}, "not a suite: 'runs': field required"),
        ({"runs": [{**RUNS[0], "seeds": [1, 1]}]}, "seeds are different numbers"),
        ({"runs": [{**RUNS[0], "workloads": ["plane-liner"]}]}, "did you mean 'plane-linear'"),
        ({"runs": [{**RUNS[0], "algorithms": ["rfat"]}]}, "unknown algorithm 'rfat'; did you mean 'raft'"),
        ({"runs": RUNS * 2}, "'plane-linear, raft, seed 1' and 'plane-linear, raft, seed 1' are the same run"),
        ({"runs": RUNS, "settings": {"images": 3}}, "write section.key"),
        ({"runs": RUNS, "ruleset": "default"}, "'ruleset'"),
        *(
            (
                {"runs": RUNS, "ruleset": ruleset, "settings": {"training.learning_rate": 1e-3}},
                f"'training.learning_rate' is not free under ruleset {ruleset}",
            )
            for ruleset in ("defaults", "tuned")
        ),
    ],
)
def test_a_suite_that_cannot_be_run_is_a_line(content: dict[str, Any], complaint: str, tmp_path: Path):
    with pytest.raises(UsageError, match=complaint) as refused:
        planned(write(tmp_path / "suite.yaml", content), tmp_path)
    assert "\n" not in str(refused.value)


def test_a_run_under_a_ruleset_says_what_it_was_made_for_and_is_never_taken_for_another(tmp_path: Path):
    free = {"settings": {"training.decode_batch": 8}, "runs": [{**RUNS[0], "seeds": [1]}]}
    (job,) = all_jobs(planned(write(tmp_path / "s.yaml", {"ruleset": "defaults", **free}), tmp_path))
    job.folder.mkdir(parents=True)
    run_jobs([job], StudyListener(), executor=Told("no"))
    record = load_record(job.folder / "record.json")
    workload = load_workload("plane-linear")
    made_for = ("defaults", "plane-linear", workload.hash)
    assert (record.ruleset, record.workload, record.workload_hash) == made_for

    finished = record.model_copy(
        update={"status": "finished", "ruleset": None, "workload": None, "workload_hash": None}
    )
    finished.save(job.folder / "record.json")
    (job.folder / "DONE").touch()
    (outcome,) = run_jobs([job], StudyListener(), executor=Told())
    assert outcome.record == load_record(job.folder / "record.json")
    assert (outcome.record.ruleset, outcome.record.workload, outcome.record.workload_hash) == made_for
    other = replace(job, stamp=replace(job.stamp, ruleset="tuned"))
    with pytest.raises(UsageError, match=r"was made for workload plane-linear .* use another --output"):
        run_jobs([other], StudyListener(), executor=Told())
    assert [o.record for o in run_jobs([replace(job, stamp=None)], StudyListener(), executor=Told())] == [
        outcome.record
    ]


def test_the_built_in_suites_are_those_of_the_rules(tmp_path: Path):
    assert suite_names() == ["defaults", "rehearsal", "tuned"]
    loaded = load_suite("defaults")
    assert loaded.suite.ruleset == "defaults"
    counts = {}
    for part in loaded.suite.runs:
        assert len(part.algorithms) == 12
        counts |= {name: len(part.seed_list) for name in part.workloads}
    assert {name: counts[name] for name in ("shapes-clip", "shapes-imagereward", "shapes-oracle")} == {
        "shapes-clip": 10,
        "shapes-imagereward": 5,
        "shapes-oracle": 5,
    }
    assert counts["plane-linear"] == counts["plane-quadratic"] == 10
    assert len(all_jobs(planned_builtin("rehearsal", tmp_path))) == 24


def test_a_suite_is_one_commands_at_a_time(flowbench_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    suite = tiny_suite(tmp_path, seeds=1)
    with locked(tmp_path / "runs" / ".suite-suite", beside=True):
        assert flowbench_main("suite", "run", suite, "--output", tmp_path / "runs") == 1
    assert f"is in use by process {os.getpid()} on " in capsys.readouterr().err


def test_a_run_that_another_process_makes_is_left_alone_and_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("flowbench.experiments.jobs.BUSY_SECONDS", 0.0)
    (job, *_) = all_jobs(planned(tiny_suite(tmp_path, seeds=1), tmp_path / "runs"))
    with locked(job.folder):
        assert job.state == "running"
        (outcome,) = run_jobs([job], StudyListener())
    assert "is in use by process" in (outcome.failure or "")
    assert job.state == "interrupted"
    assert [path.name for path in job.folder.iterdir()] == [".lock"]


def planned_builtin(name: str, output: Path) -> list[Cell]:
    return plan(load_suite(name), output, "cpu")


def test_suite_show_counts_every_state_whole_at_80_columns_and_says_the_command_for_the_rest(
    flowbench_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    workloads = ["plane-linear", "shapes-oracle"]
    runs = [{"workloads": workloads, "algorithms": ["raft", "draft"], "seeds": {"count": 1000}}]
    suite = write(tmp_path / "suite.yaml", {"runs": runs})
    jobs = all_jobs(planned(suite, tmp_path / "runs"))
    raft = [job for job in jobs if "plane-linear, raft" in job.label]
    for job in raft[:3]:
        job.folder.mkdir(parents=True)
        (job.folder / "DONE").touch()
    raft[3].folder.mkdir()
    run_jobs(raft[4:6], StudyListener(), executor=Told("no [/] memory", "NaN"))
    with locked(raft[6].folder):
        assert flowbench_main("suite", "show", suite, "--output", tmp_path / "runs") == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["raft", "1000", "3", "1", "1", "2", "993"] in rows
    assert ["draft", "1000", "-", "-", "-", "-", "1000"] in rows
    assert ["draft", "n/a"] in rows
    assert "not applicable: draft on shapes-oracle; draft needs the reward's gradient" in printed
    assert "failed: plane-linear, raft, seed 4: no [/] memory" in printed
    assert "3 done, 1 running, 1 interrupted, 2 failed, 2993 missing" in printed
    again = f"flowbench suite run {suite} --output {tmp_path / 'runs'}"
    assert f"for the rest: {again}\n" in printed
    assert f"to make failed ones again: {again} --retry-failed\n" in printed


def test_a_suite_is_shown_before_anything_is_run(flowbench_main: Main, tmp_path: Path, capsys: Any):
    suite = tiny_suite(tmp_path, seeds=1)
    assert flowbench_main("suite", "run", suite, "--output", tmp_path / "runs", "--dry-run") == 0
    assert "cost: 512 training images in 2 runs" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_compare_trains_and_says_which_differences_hold(
    flowbench_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    # The runs are made in this process.
    monkeypatch.setattr("flowbench.experiments.executors.make_executor", lambda *_, **__: None)
    monkeypatch.setenv("COLUMNS", "80")
    settings = ["training.images_per_prompt=4", "training.minibatch=64", "evaluation.prompts=4"]
    arguments = ["compare", "quick", "nft", "--rewards", "linear, linear:1.0", "--seeds", "2", "--images", "64"]
    arguments += ["--model", "gaussian", "--device", "cpu", "--output", str(tmp_path)]
    arguments += [part for text in settings for part in ("--set", text)]
    assert flowbench_main(*arguments) == 0
    printed = capsys.readouterr().out
    records = find_records([tmp_path])
    assert len(records) == 4  # the same reward twice is one
    assert {record.workload for record in records} == {None}
    assert "gaussian on linear, 64 images: linear on test, trained on" in printed
    gains = {
        name: mean([r.scores["linear/test"].change for r in records if r.algorithm == name])
        for name in ("quick", "nft")
    }
    better, worse = sorted(gains, key=lambda name: -gains[name])
    assert any(line.split()[:3] == [better, "2", f"{gains[better]:+.3f}"] for line in printed.splitlines())
    assert f"{better} - {worse}" in printed
    assert f"{gains[better] - gains[worse]:+.3f} [" in printed


def test_compare_plans_every_reward_with_the_models_budget(flowbench_main: Main, tmp_path: Path, capsys: Any):
    arguments = ["compare", "raft", "draft", "--rewards", "clip,oracle", "--seeds", "2", "--first-seed", "7"]
    assert flowbench_main(*arguments, "--output", tmp_path, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "cost: 17280 training images in 6 runs" in printed
    assert "not applicable: draft on mini-sd3-oracle" in printed


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["raft"], "name two or more different algorithms"),
        (["raft", "raft"], "name two or more different algorithms"),
        (["raft", "nfft"], "unknown algorithm 'nfft'; did you mean 'nft'"),
        (["raft", "nft", "--rewards", "clap"], "unknown reward 'clap'; did you mean 'clip'"),
        (["raft", "nft", "--slurm", "partition"], "write --slurm partition=gpu"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_a_line(
    arguments: list[str], complaint: str, flowbench_main: Main, capsys: pytest.CaptureFixture[str]
):
    assert flowbench_main("compare", *arguments) == 2
    assert complaint in capsys.readouterr().err
