"""A search of settings: the same for every algorithm, selected on dev alone, with everything that was tried kept."""

from __future__ import annotations

import csv
import hashlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from pydantic import Field

import flowbench
from flowbench.algorithm import (
    COMMON_SEARCH_SPACE,
    Algorithm,
    AlgorithmConfig,
    Choice,
    Integers,
    LogUniform,
    Uniform,
    register_algorithm,
)
from flowbench.config import RunConfig
from flowbench.errors import BusyError, RunError, RunInterruptedError, UsageError
from flowbench.evaluation.statistics.search import expected_best
from flowbench.experiments import executors
from flowbench.experiments.executors import DIED
from flowbench.experiments.jobs import Job, Outcome, run_job
from flowbench.experiments.study import StudyListener
from flowbench.experiments.tuning import search
from flowbench.experiments.tuning.dev import dev_result
from flowbench.experiments.tuning.files import median_gain, read_chosen
from flowbench.experiments.tuning.plan import SearchPlan, search_plan
from flowbench.experiments.tuning.search import Places, attempt_of, study_folder
from flowbench.experiments.tuning.selection import Candidate, DevResult, finalists, select, worth
from flowbench.experiments.tuning.space import search_space
from flowbench.experiments.tuning.tune import planned, searchable, tune
from flowbench.locks import locked
from flowbench.record import Point, Record, Score, Spent, load_record
from flowbench.registry import algorithms
from flowbench.workloads import Workload, load_workload

BEST_RATE = 3e-4
WORKLOAD = Workload(name="tiny", model="mini-sd3", reward="clip", images=64)
Rule = Callable[[RunConfig], "tuple[float, float]"]


@pytest.fixture(autouse=True)
def drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than searches; one claim looks at them."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(search, "draw_search", lambda stem, picture: [])


@pytest.fixture
def quick(clean_registry: None) -> str:
    """An algorithm that is only declared; its runs are made up."""

    @register_algorithm("quick", paper="none", needs={"endpoint"})
    class Quick(Algorithm["Quick.Config"]):
        """Has an optimum that is known."""

        class Config(AlgorithmConfig):
            tau: float = Field(1.0, gt=0)

        search_space: ClassVar = {
            "training.learning_rate": LogUniform(3e-5, 3e-3),
            "training.tuning": Choice(("full", "lora")),
            "algorithm.tau": Uniform(0.5, 2.0),
        }

    return "quick"


def known(config: RunConfig) -> tuple[float, float]:
    """Reward and diversity of a run: best at one learning rate, and full tuning keeps too little diversity."""
    off = math.log10(config.training.learning_rate / BEST_RATE)
    noise = 0.01 * math.sin(config.seed + 100 * config.hyperparameters["tau"])
    return 0.5 - 0.1 * off**2 + noise, 0.2 if config.training.tuning == "full" else 0.95


def made_up(config: RunConfig, score: float, diversity: float, **other: Any) -> Record:
    """A run's record with these scores on dev, where the base model has 0.3 and 1."""
    images, held_out = config.training.images, other.pop("held_out", {})
    spent = dict.fromkeys(Spent.model_fields, 0.0) | {"images": images, "reward_calls": 0, "function_evaluations": 0}
    scores = {"clip": score, "diversity": diversity, **held_out}
    content: dict[str, Any] = {
        "algorithm": config.algorithm,
        "reward": config.reward,
        "model": config.model,
        "seed": config.seed,
        "budget": Spent.model_validate(spent),
        "scores": {},
        "per_prompt": {},
        "prompts": {},
        "config": {},
        "config_hash": config.hash(),
        "protocol_hash": "",
        "prompt_hashes": {},
        "reward_provenance": {},
        "command": "",
        "commit": None,
        "device": "",
        "versions": {},
        "finished": "",
        "points": (Point(images=images, iteration=1, seconds=1.0, function_evaluations=1, scores=scores),),
        "dev_base": {
            "clip": 0.3,
            "diversity": 1.0,
            **{name: 0.0 for name in scores if name not in ("clip", "diversity")},
        },
    }
    return Record.model_validate(content | other)


class Runner:
    """Makes up runs in the place of `run_jobs`, keeps those that are finished, and may be interrupted."""

    def __init__(self, rule: Rule = known, stop_after: int | None = None, failing: Sequence[int] = ()) -> None:
        self.rule, self.stop_after, self.failing = rule, stop_after, failing
        self.made: list[str] = []
        self.finished: dict[Path, Record] = {}

    def __call__(self, jobs: Sequence[Job], listener: StudyListener) -> list[Outcome]:
        outcomes = []
        for done, job in enumerate(jobs, 1):
            if job.folder in self.finished:
                outcomes.append(Outcome(job, self.finished[job.folder]))
                continue
            if self.stop_after is not None and len(self.made) >= self.stop_after:
                self.stop_after = None
                raise RunInterruptedError("interrupted")
            self.made.append(job.label)
            outcome = Outcome(job, made_up(job.config, *self.rule(job.config)))
            if any(f"trial {number} " in job.label for number in self.failing):
                outcome = Outcome(job, None, "=the loss is nan")
            elif outcome.record:
                self.finished[job.folder] = outcome.record
            outcomes.append(outcome)
            if len(self.made) % 3:  # of some an interrupted call never hears
                listener.on_outcome(outcome, done, len(jobs))
        return outcomes


def places(folder: Path) -> Places:
    return Places(folder / "runs", folder / "search", "cpu")


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "trials.csv").read_text(encoding="utf-8").splitlines()))


def small_plan(**changed: Any) -> SearchPlan:
    return search_plan(WORKLOAD, **{"trials": 8, "finalists": 2, "more_seeds": 2, **changed})


# --- the search -------------------------------------------------------------------------------------------------------


def test_a_search_is_one_processs_at_a_time(quick: str, tmp_path: Path):
    where, plan = places(tmp_path), small_plan()
    assert where.logs is not None
    folder = study_folder(where.logs, quick, plan, 0)
    with locked(folder), pytest.raises(BusyError, match=r"the search in .* is in use by process"):
        tune([quick], plan, where, run=Runner())
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_search_ends_with_the_best_trial_that_keeps_diversity(quick: str, tmp_path: Path):
    runner = Runner()
    (result,) = tune([quick], small_plan(), places(tmp_path), run=runner)
    assert len(runner.made) == 8 + 2 * 2
    keep = [t for t in result.trials if t.settings["training.tuning"] == "lora"]
    rewards = {
        t.number: np.mean([a.result.reward for a in t.attempts if a.result]) for t in keep if len(t.attempts) == 3
    }
    assert len(rewards) == 2
    assert result.chosen.selected == max(rewards, key=lambda number: rewards[number])
    assert result.chosen.gain == pytest.approx(max(rewards.values()) - 0.3)
    assert result.chosen.seeds_of_selected == (1000, 1001, 1002)
    assert result.chosen.collapsed == len(result.trials) - len(keep) > 0


def test_a_search_leaves_its_log_its_trials_its_choice_and_a_picture(quick: str, tmp_path: Path):
    tune([quick], small_plan(), places(tmp_path), run=Runner(failing=[1]))
    folder = tmp_path / "search" / "mini-sd3" / "quick"
    names = {".lock", "journal.log", "trials.csv", "chosen.yaml", "search.svg", "search-dark.svg"}
    assert {path.name for path in folder.iterdir()} == names
    drawn = (folder / "search.svg").read_text(encoding="utf-8")
    assert all(text in drawn for text in ("algorithm.tau", "0.001", "best of k trials", "the star is the selected"))
    assert "mathdefault" not in drawn
    chosen = read_chosen(folder / "chosen.yaml")
    assert chosen.log_sha256 == hashlib.sha256((folder / "journal.log").read_bytes()).hexdigest()
    assert (chosen.workload_hash, chosen.sampler, chosen.scramble_seed) == (WORKLOAD.hash, "qmc", 0)
    assert chosen.run_seeds == (1000, 1001, 1002)
    assert set(chosen.settings) == set(algorithms.get(quick).cls.search_space)
    table = rows(folder)
    assert [row["state"] for row in table if row["trial"] == "1"] == ["failed"]
    assert [row["failure"] for row in table if row["trial"] == "1"] == ["'=the loss is nan"]
    assert len(table) == 8 + 2 * 2
    assert {row["seed"] for row in table if row["state"] == "selected"} == {"1000", "1001", "1002"}


@pytest.mark.parametrize("stops", [(0,), (3, 7), (5, 9, 10, 11)])
def test_an_interrupted_search_that_is_repeated_ends_as_an_undisturbed_one(quick: str, tmp_path: Path, stops: Any):
    tune([quick], small_plan(), places(tmp_path / "once"), run=Runner(failing=[2]))
    runner = Runner(failing=[2])
    for stop in stops:
        runner.stop_after = stop
        with pytest.raises(RunInterruptedError):
            tune([quick], small_plan(), places(tmp_path / "often"), run=runner)
    tune([quick], small_plan(), places(tmp_path / "often"), run=runner)
    once, often = (tmp_path / name / "search" / "mini-sd3" / "quick" for name in ("once", "often"))
    assert (once / "trials.csv").read_bytes() == (often / "trials.csv").read_bytes()
    first, second = (read_chosen(folder / "chosen.yaml").model_dump(exclude={"log_sha256"}) for folder in (once, often))
    assert first == second


def test_a_finished_search_that_is_repeated_runs_nothing(quick: str, tmp_path: Path):
    tune([quick], small_plan(), places(tmp_path), run=Runner(failing=[4]))
    log = (tmp_path / "search" / "mini-sd3" / "quick" / "journal.log").read_bytes()
    again = Runner()
    tune([quick], small_plan(), places(tmp_path), run=again)
    assert again.made == []
    assert (tmp_path / "search" / "mini-sd3" / "quick" / "journal.log").read_bytes() == log


def test_more_trials_continue_the_same_sequence(quick: str, tmp_path: Path):
    (short,) = tune([quick], small_plan(trials=4), places(tmp_path), run=Runner())
    (long,) = tune([quick], small_plan(), places(tmp_path), run=Runner())
    assert [t.settings for t in long.trials[:4]] == [t.settings for t in short.trials]
    assert len(long.trials) == 8


def test_proposals_do_not_depend_on_results(quick: str, tmp_path: Path):
    (first,) = tune([quick], small_plan(), places(tmp_path / "a"), run=Runner())
    (other,) = tune([quick], small_plan(), places(tmp_path / "b"), run=Runner(lambda config: (-1.0, 1.0)))
    assert [t.settings for t in first.trials] == [t.settings for t in other.trials]


def test_a_scrambled_sobol_sequence_fills_each_dimension_evenly(quick: str, tmp_path: Path):
    space = algorithms.get(quick).cls.search_space
    trials = [r.trial for r in planned([quick], small_plan(trials=16), places(tmp_path))]
    assert not (tmp_path / "search").exists()
    for key in ("training.learning_rate", "algorithm.tau"):
        cells = sorted(int(16 * space[key].place(t.settings[key])) for t in trials)
        assert cells == list(range(16))
    assert sum(t.settings["training.tuning"] == "full" for t in trials) == 8


def test_algorithms_are_tried_at_the_same_values_of_what_they_share(tmp_path: Path):
    names = ["nft", "ddpo", "dpok"]  # of five, three and four dimensions
    trials = [request.trial for request in planned(names, small_plan(), places(tmp_path))]
    shared = list(COMMON_SEARCH_SPACE)
    tried = [[tuple(t.settings[key] for key in shared) for t in trials[k * 8 : k * 8 + 8]] for k in range(3)]
    assert tried[0] == tried[1] == tried[2]
    assert len(set(tried[0])) == 8


def test_studies_have_sequences_and_seeds_of_their_own_and_a_median(quick: str, tmp_path: Path):
    plan = search_plan(WORKLOAD, studies=3)
    assert (plan.ruleset, plan.trials, plan.runs) == ("tuned", 5, 15)
    results = tune([quick], plan, places(tmp_path), run=Runner())
    assert [r.chosen.run_seeds for r in results] == [(1000,), (1100,), (1200,)]
    rates = [tuple(t.settings["training.learning_rate"] for t in r.trials) for r in results]
    assert len({rate for study in rates for rate in study}) == 15
    folder = tmp_path / "search" / "mini-sd3" / "quick"
    studies = yaml.safe_load((folder / "tiny-studies.yaml").read_text(encoding="utf-8"))
    assert studies["gains"] == [r.chosen.gain for r in results]
    assert studies["median"] == sorted(studies["gains"])[1]
    assert all((folder / name).is_file() for name in studies["files"])


def test_a_log_of_another_search_is_refused(quick: str, tmp_path: Path):
    tune([quick], small_plan(), places(tmp_path), run=Runner())
    for changed in ({"seed": 1}, {"settings": {"training.ema": 0.5}}, {"sampler": "tpe"}):
        with pytest.raises(UsageError, match=r"is the log of another search .*; use another --output"):
            tune([quick], small_plan(**changed), places(tmp_path), run=Runner())


def test_a_line_that_a_killed_process_left_half_written_is_forgotten(quick: str, tmp_path: Path):
    runner = Runner(stop_after=5)
    with pytest.raises(RunInterruptedError):
        tune([quick], small_plan(), places(tmp_path), run=runner)
    log = tmp_path / "search" / "mini-sd3" / "quick" / "journal.log"
    log.write_bytes(log.read_bytes() + b'{"op_code": 3, "work')
    (result,) = tune([quick], small_plan(), places(tmp_path), run=runner)
    assert len(runner.made) == 8 + 2 * 2
    assert result.chosen.selected is not None


def test_tpe_learns_from_results_and_is_marked_as_outside_of_the_rules(quick: str, tmp_path: Path):
    plan = search_plan(WORKLOAD, trials=12, finalists=0, sampler="tpe", seed=1)
    assert plan.ruleset is None
    (result,) = tune([quick], plan, places(tmp_path), run=Runner())
    assert "the sampler is tpe; the rules have qmc" in result.chosen.deviations
    (other,) = tune([quick], plan, places(tmp_path / "b"), run=Runner(lambda c: (c.training.learning_rate, 1.0)))
    assert [t.settings for t in result.trials] != [t.settings for t in other.trials]
    assert result.trials[0].settings == other.trials[0].settings


def test_the_records_of_a_searchs_runs_say_what_they_were_made_for(quick: str, tmp_path: Path):
    seen: list[Job] = []

    def runner(jobs: Sequence[Job], listener: StudyListener) -> list[Outcome]:
        seen.extend(jobs)
        return Runner()(jobs, listener)

    tune([quick], search_plan(WORKLOAD), places(tmp_path), run=runner)
    stamps = {(job.stamp.ruleset, job.stamp.workload, job.stamp.workload_hash) for job in seen if job.stamp}
    assert stamps == {("search", "tiny", WORKLOAD.hash)}
    assert len(seen) == 20 + 3 * 2
    assert all(job.config.evaluation.splits == () and job.config.evaluation.judges == () for job in seen)
    assert {job.config.seed for job in seen} == {1000, 1001, 1002}


def test_settings_that_cannot_run_together_are_a_failed_trial(clean_registry: None, tmp_path: Path):
    @register_algorithm("warm", paper="none", needs={"endpoint"})
    class Warm(Algorithm["Warm.Config"]):
        """Warms up for longer than there is time."""

        class Config(AlgorithmConfig):
            warmup: int = Field(0, ge=0)

        search_space: ClassVar = {"algorithm.warmup": Integers(0, 3), "training.learning_rate": LogUniform(1e-4, 1e-3)}

    (result,) = tune(["warm"], small_plan(), places(tmp_path), run=Runner(lambda config: (0.4, 1.0)))
    long = [t for t in result.trials if t.settings["algorithm.warmup"] >= 2]
    assert long
    assert all(t.failure and t.failure.startswith("refused: training.images is 64, all of which") for t in long)
    assert result.chosen.failed == len(long)


def test_prompts_without_a_split_dev_are_refused_before_anything_runs(quick: str, tmp_path: Path):
    workload = Workload(name="tiny", model="mini-sd3", reward="clip", images=64, prompts="objects")
    with pytest.raises(UsageError, match="have no split 'dev'; a search needs one"):
        tune([quick], search_plan(workload), places(tmp_path), run=Runner())


PLANE = Workload(
    name="points",
    model="gaussian",
    reward="linear",
    images=64,
    evaluation={"num_steps": 10},
)
TINY = {"training.prompts_per_iteration": 4, "training.images_per_prompt": 4, "training.minibatch": 16}


def test_a_searchs_runs_are_scored_on_dev_and_on_nothing_else(tmp_path: Path, pictures: Any):
    plan = search_plan(PLANE, trials=1, finalists=0, settings=TINY)
    with pictures():
        (study,) = tune(["nft"], plan, places(tmp_path))
    assert study.trials[0].failure is None
    record = load_record(next((tmp_path / "runs").rglob("record.json")))
    assert (record.scores, record.per_prompt, record.judges, record.workload) == ({}, {}, {}, "points")
    (attempt,) = study.trials[0].attempts
    assert attempt.result == dev_result(record)
    assert attempt.run == f"{record.config_hash}-s1000"


def test_the_order_in_which_runs_end_does_not_change_a_search(quick: str, tmp_path: Path):
    def backwards(jobs: Sequence[Job], listener: StudyListener) -> list[Outcome]:
        return Runner()(jobs[::-1], listener)[::-1]

    tune([quick], small_plan(), places(tmp_path / "a"), run=Runner())
    tune([quick], small_plan(), places(tmp_path / "b"), run=backwards)
    first, second = (tmp_path / name / "search" / "mini-sd3" / "quick" / "trials.csv" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def cut_off(labels: Sequence[str], failure: str, runner: Runner) -> Callable[..., list[Outcome]]:
    """The runner, of which these runs are cut off, each once for each time that it is named."""
    left = list(labels)

    def run(jobs: Sequence[Job], listener: StudyListener) -> list[Outcome]:
        lost = [job for job in jobs if job.label in left]
        for job in lost:
            left.remove(job.label)
        outcomes = [Outcome(job, None, failure, cut_off=True) for job in lost]
        return [*outcomes, *runner([job for job in jobs if job not in lost], listener)]

    return run


def test_a_run_that_was_cut_off_is_made_again_and_is_no_result(quick: str, tmp_path: Path):
    lost = cut_off(["quick trial 3 seed 1000", "quick trial 5 seed 1000"], DIED, Runner())
    (once,) = tune([quick], small_plan(), places(tmp_path / "a"), run=lost)
    (undisturbed,) = tune([quick], small_plan(), places(tmp_path / "b"), run=Runner())
    assert once.trials == undisturbed.trials


def test_a_run_whose_worker_dies_again_has_failed_by_itself(quick: str, tmp_path: Path):
    (found,) = tune(
        [quick], small_plan(), places(tmp_path), run=cut_off(["quick trial 3 seed 1000"] * 2, DIED, Runner())
    )
    assert [(t.number, t.failure) for t in found.trials if t.failure] == [(3, f"{DIED}, twice")]


def test_a_search_whose_machine_fails_selects_nothing_yet_and_continues_when_that_is_mended(quick: str, tmp_path: Path):
    runner, full = Runner(), "OSError: [Errno 28] No space left on device"
    lost = cut_off(["quick trial 3 seed 1000"] * 2, full, runner)
    with pytest.raises(RunError, match=r"1 runs were cut off .* quick trial 3 seed 1000: OSError.*; mend that"):
        tune([quick], small_plan(), places(tmp_path), run=lost)
    assert len(runner.made) == 7
    assert not (tmp_path / "search" / "mini-sd3" / "quick" / "chosen.yaml").exists()
    (found,) = tune([quick], small_plan(), places(tmp_path), run=runner)
    assert len(runner.made) == 8 + 2 * 2
    assert not any(trial.failure for trial in found.trials)


def test_runs_of_several_algorithms_wait_in_one_queue_trial_by_trial(quick: str, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    runner = Runner(lambda config: (0.4, 1.0))
    listener = StudyListener(on_outcome=lambda outcome, done, total: seen.append((done, total)))
    tune([quick, "nft"], small_plan(), places(tmp_path), listener, run=runner)
    assert runner.made[:4] == [f"{name} trial {k} seed 1000" for k in (0, 1) for name in (quick, "nft")]
    assert [done for done, _ in seen] == [k + 1 for k, _ in enumerate(runner.made) if (k + 1) % 3]
    assert {total for _, total in seen} == {2 * (8 + 2 * 2)}


def test_a_continued_search_counts_the_runs_that_it_has(quick: str, tmp_path: Path):
    runner = Runner(stop_after=6)
    with pytest.raises(RunInterruptedError):
        tune([quick], small_plan(), places(tmp_path), run=runner)
    seen: list[int] = []
    listener = StudyListener(on_outcome=lambda outcome, done, total: seen.append(done))
    tune([quick], small_plan(), places(tmp_path), listener, run=runner)
    assert (seen[0], seen[-1]) == (7, 8 + 2 * 2 - 1)


class Here:
    """Runs of one thread, as the command's workers have it, in this process."""

    def carry_out(self, jobs: Sequence[Job], plugins: Sequence[Path], running: Any) -> Iterator[tuple[Job, str | None]]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from ((job, run_job(job).failure) for job in jobs)
        finally:
            torch.set_num_threads(threads)


def test_a_search_that_is_killed_and_repeated_ends_as_an_undisturbed_one(tmp_path: Path):
    content = PLANE.model_dump(mode="json", include={"model", "reward", "images", "evaluation"})
    (tmp_path / "points.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    words = [sys.executable, "-P", "-m", "flowbench", "tune", "raft", "--workload", str(tmp_path / "points.yaml")]
    words += ["--device", "cpu", "--trials", "3", "--finalists", "1", "--more-seeds", "1"]
    words += ["--runs", str(killed / "runs"), "--output", str(killed / "search")]
    words += [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not list(killed.rglob("record.json")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    begun = len(list(killed.rglob("record.json")))
    assert 0 < begun < 4
    plan = search_plan(load_workload(str(tmp_path / "points.yaml")), 3, 1, 1, 1, settings=TINY)
    for folder in (killed, whole):
        tune(["raft"], plan, places(folder), executor=Here())
    mine, theirs = (rows(folder / "search" / "gaussian" / "raft") for folder in (killed, whole))
    assert mine == theirs
    assert {row["state"] for row in mine} <= {"done", "selected", "finalist", "collapsed"}
    assert not [path for path in whole.rglob("*") if path.suffix == ".png" or path.name == "last.safetensors"]


def test_the_python_api_searches_as_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = PLANE.model_dump(mode="json", include={"model", "reward", "images", "evaluation"})
    (tmp_path / "points.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    asked: list[Any] = []
    monkeypatch.setattr(executors, "executor_for", lambda *given: asked.append(given) or Here())
    where = {"runs": tmp_path / "runs", "output": tmp_path / "search", "device": "cpu"}
    few: dict[str, Any] = {"trials": 1, "finalists": 0, "settings": TINY, "jobs": 2, **where}
    (found,) = flowbench.tune("raft", str(tmp_path / "points.yaml"), **few)
    assert (found.chosen.algorithm, found.chosen.trials, found.trials[0].failure) == ("raft", 1, None)
    assert asked[0][:5] == ("local", 2, 1, None, "cpu")
    assert (tmp_path / "search" / "gaussian" / "raft" / "chosen.yaml").exists()
    with pytest.raises(UsageError, match="did you mean 'raft'"):
        flowbench.tune("rft")


def test_all_are_the_algorithms_that_can_be_run_on_the_workload(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    oracle = load_workload("shapes-oracle")
    found = searchable(search_plan(oracle), places(tmp_path))
    assert {"acflow", "nft", "ddpo"} <= set(found)
    assert not {"draft", "refl"} & set(found)
    assert "'draft' is not searched" in caplog.text


@pytest.mark.slow
def test_two_processes_give_the_same_search_as_one(tmp_path: Path):
    plan = search_plan(PLANE, trials=3, finalists=1, more_seeds=1, settings=TINY)
    found = []
    for workers in (1, 2):
        (study,) = tune(["nft", "raft"], plan, places(tmp_path / str(workers)), workers=workers)[:1]
        found.append((tmp_path / str(workers) / "search" / "gaussian" / "nft" / "trials.csv").read_text())
        assert all(trial.failure is None for trial in study.trials)
    assert found[0] == found[1]


# --- the space --------------------------------------------------------------------------------------------------------


def test_choices_that_a_model_refuses_are_no_part_of_the_space_and_named(tmp_path: Path):
    plan = search_plan(load_workload("plane-linear"), trials=2)
    requests = planned(["nft"], plan, places(tmp_path))
    space = requests[0].search.space
    assert "training.tuning" not in space.dimensions
    assert space.fixed == {"training.tuning": "full"}
    assert "training.tuning=lora: model 'mixture' has no layers for LoRA" in space.refused[0]
    assert all(request.trial.settings["training.tuning"] == "full" for request in requests)


def test_an_optimum_at_an_edge_is_reported_and_one_inside_is_not():
    declared = {
        "training.learning_rate": LogUniform(1e-5, 1e-3),
        "training.ema": Choice((0.0, 0.9, 0.99)),
        "training.tuning": Choice(("full", "lora")),
    }
    space = search_space(declared, lambda settings: None)
    inside = {"training.learning_rate": 1e-4, "training.ema": 0.9, "training.tuning": "full"}
    assert space.edges(inside) == ()
    found = space.edges({**inside, "training.learning_rate": 9.9e-4, "training.ema": 0.99})
    assert found == (
        "training.learning_rate = 0.00099 stands at 1.00 of 1e-05 to 0.001",
        "training.ema = 0.99 stands at 1.00 of 0 to 0.99",
    )


# --- selection --------------------------------------------------------------------------------------------------------


def result(reward: float, diversity: float = 1.0) -> DevResult:
    return DevResult(reward, 0.3, diversity, 1.0)


def candidate(number: int, *results: DevResult | None) -> Candidate:
    return Candidate(number, results)


def test_a_selection_receives_the_reward_trained_on_and_the_diversity_and_nothing_else(quick: str, tmp_path: Path):
    assert {field.name for field in fields(DevResult)} == {"reward", "base_reward", "diversity", "base_diversity"}
    assert {field.name for field in fields(Candidate)} == {"number", "results"}
    config = planned([quick], small_plan(), places(tmp_path))[0].search.job
    request = planned([quick], small_plan(), places(tmp_path))[0]
    plain = made_up(config(request).config, 0.4, 0.97)
    other = made_up(
        config(request).config,
        0.4,
        0.97,
        held_out={"oracle_exact": 1.0, "hpsv2": 9.0, "w2": 5.0},
        scores={
            "clip/test": Score(base=0, tuned=9, diff_ci95=(8, 9)),
            "oracle_exact/test": Score(base=0, tuned=1, diff_ci95=(1, 1)),
        },
        per_prompt={"clip/test": {"base": [0.0], "tuned": [9.0]}},
    )
    assert dev_result(plain) == dev_result(other) == DevResult(0.4, 0.3, 0.97, 1.0)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"points": ()}, "no score on dev at the end of its budget"),
        ({"dev_base": {"clip": 0.3}}, "lack 'diversity'"),
        ({"reward": "jpeg"}, "lack 'jpeg'"),
        ({"dev_base": {"clip": math.nan, "diversity": 1.0}}, "is no number"),
        ({"dev_base": {"clip": 0.3, "diversity": 0.0}}, "is no number"),
    ],
)
def test_a_run_whose_end_on_dev_is_unknown_is_a_failed_one(quick: str, tmp_path: Path, changed: Any, complaint: str):
    request = planned([quick], small_plan(), places(tmp_path))[0]
    job = request.search.job(request)
    attempt = attempt_of(Outcome(job, made_up(job.config, 0.4, 0.97, **changed)))
    assert attempt.result is None
    assert complaint in (attempt.failure or "")


def test_a_point_before_the_end_of_the_budget_selects_nothing(quick: str, tmp_path: Path):
    request = planned([quick], small_plan(), places(tmp_path))[0]
    job = request.search.job(request)
    record = made_up(job.config, 0.4, 0.97)
    early = record.model_copy(update={"points": (record.points[0].model_copy(update={"images": 32}),)})
    assert "end of its budget" in (attempt_of(Outcome(job, early)).failure or "")


def test_failed_and_collapsed_trials_are_never_selected():
    best = candidate(3, result(0.5, 0.91))
    others = [
        candidate(0, None),
        candidate(1, result(9.0, 0.89)),
        candidate(2, result(math.nan)),
        candidate(4, result(0.4)),
    ]
    assert select([*others, best], 1) == best
    assert finalists([*others, best], 3) == (3, 4)
    assert select(others[:3], 1) is None


def test_the_mean_over_seeds_selects_and_a_seed_that_failed_disqualifies():
    lucky = candidate(0, result(0.9), result(0.3), result(0.3))
    steady = candidate(1, result(0.6), result(0.6), result(0.6))
    broken = candidate(2, result(0.8), None, result(0.8))
    thin = candidate(3, result(0.9, 0.95), result(0.9, 0.8), result(0.9, 0.8))
    unfinished = candidate(4, result(1.0))
    assert select([lucky, steady, broken, thin, unfinished], 3) == steady


def test_of_equal_trials_the_earlier_is_selected():
    assert select([candidate(5, result(0.5)), candidate(2, result(0.5))], 1) == candidate(2, result(0.5))


def test_a_search_without_a_trial_that_qualifies_says_so(quick: str, tmp_path: Path):
    (found,) = tune([quick], small_plan(), places(tmp_path), run=Runner(lambda config: (0.9, 0.1), failing=[0]))
    assert found.chosen.selected is None
    assert found.chosen.settings == {}
    assert found.chosen.reason.startswith("no trial qualifies: of 8, 1 failed and 7 kept less than 0.9")
    assert found.chosen.best_of == (0.0,) * 8


# --- how the best of k grows ------------------------------------------------------------------------------------------


def test_the_expected_best_of_k_is_the_mean_over_all_subsets():
    trials = [candidate(i, result(0.3 + g, d)) for i, (g, d) in enumerate([(0.1, 1), (-0.2, 1), (0.4, 0.5), (0.3, 1)])]
    trials.append(candidate(4, None))

    def value(subset: Sequence[Candidate]) -> float:
        chosen = select(subset, 1)
        return chosen.gain if chosen else 0.0

    brute = [np.mean([value(s) for s in itertools.combinations(trials, k)]) for k in range(1, 6)]
    assert expected_best(worth(trials)) == pytest.approx(brute)


def test_the_median_of_studies_counts_a_study_without_a_choice_as_the_lowest():
    assert median_gain([0.1, 0.3, 0.2]) == 0.2
    assert median_gain([None, 0.3, 0.2]) == 0.2
    assert median_gain([None, None, 0.2]) is None


# --- the rules --------------------------------------------------------------------------------------------------------


def test_only_what_the_rules_have_counts_as_a_ruleset():
    assert search_plan(WORKLOAD).ruleset == "defaults"
    assert search_plan(WORKLOAD).runs == 20 + 3 * 2
    assert search_plan(WORKLOAD, settings={"evaluation.batch": 16}).ruleset == "defaults"
    for changed in ({"trials": 19}, {"finalists": 2}, {"more_seeds": 1}, {"settings": {"training.epochs": 2}}):
        plan = search_plan(WORKLOAD, **changed)  # type: ignore[arg-type]
        assert plan.ruleset is None
        assert plan.deviations
    assert search_plan(WORKLOAD, studies=2).deviations == ("studies: 2; the rules have 3",)
