from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from small import SMALL
from test_leaderboard import record as make_record

from flowbench.config import RunConfig
from flowbench.errors import RunError, RunInterruptedError, UsageError
from flowbench.experiments.ablation import Variant, all_jobs, plan, rows, to_csv, to_markdown
from flowbench.experiments.run import Listener
from flowbench.experiments.study import Job, Outcome, StudyListener, run_jobs
from flowbench.record import Score, find_records
from flowbench.registry import algorithms, load_plugin_file
from flowbench.reporting.plots import Curve

Main = Callable[..., int]
Settings = Callable[..., list[str]]

STUDIED = '''
"""An algorithm with ablations: one that breaks it, one that is its default anyway, one that is a change."""

import torch
from pydantic import Field

from flowbench.algorithm import Algorithm, AlgorithmConfig, Batch, Draws, Loss, Rollout, endpoints, register_algorithm
from flowbench.models.flow import velocity_error
from flowbench.toolkit.matching import renoised


@register_algorithm("studied", paper="none", needs={"endpoint"})
class Studied(Algorithm["Studied.Config"]):
    """Fits what scores above its prompt's mean; logs a made-up explained variance."""

    class Config(AlgorithmConfig):
        scale: float = Field(1.0, description="of the loss")
        broken: bool = Field(False, description="whether the loss becomes infinite in the second iteration")

    ablations = ({"scale": 0.5}, {"broken": True}, {"scale": 1.0})

    def draws(self):
        return Draws(noises=1, sigma=True)

    def prepare(self, rollout: Rollout) -> Batch:
        self.iteration = rollout.iteration
        return endpoints(rollout, rollout.center(rollout.reward))

    def loss(self, policy, batch: Batch) -> Loss:
        noisy = renoised(batch)
        loss = self.cfg.scale * batch.advantage * velocity_error(
            policy.velocity(noisy.x, noisy.sigma, batch.cond), noisy.u
        )
        if self.cfg.broken and self.iteration == 1:
            loss = loss + torch.inf
        return Loss(loss, metrics={"explained_variance_0.00": self.iteration / 10})
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "studied.py"
    path.write_text(STUDIED, encoding="utf-8")
    return path


def run(output: Path) -> dict[str, Any]:
    """Arguments of `plan` beside algorithm, overrides and seeds."""
    return {"split": "test", "reward": "linear", "model": "gaussian", "device": "cpu", "output": output}


def test_a_study_makes_ordinary_runs_reports_failures_and_repeats_nothing(
    flowbench_main: Main,
    settings: Settings,
    plugin: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    arguments = ["ablate", "studied", "--plugin", plugin, "--reward", "linear", "--model", "gaussian", "--seeds", "2"]
    arguments += ["--device", "cpu", "--output", tmp_path / "runs", "--plot", tmp_path / "curves.png", *settings()]
    csv_file = ["--format", "csv", "--table", tmp_path / "table.csv"]
    assert flowbench_main(*arguments, *csv_file) == 0
    printed = capsys.readouterr().err
    assert "run 6 of 6" in printed  # scale=1.0 is the default: it is not run again
    assert printed.count("failed: the loss of 'studied' is inf") == 2
    assert (tmp_path / "curves.png").stat().st_size > 5000

    everything = find_records([tmp_path / "runs"])
    failed = [r for r in everything if r.status == "failed"]
    assert [(r.seed, (r.failure or "").partition(";")[0]) for r in failed] == [
        (0, "the loss of 'studied' is inf"),
        (1, "the loss of 'studied' is inf"),
    ]
    records = [r for r in everything if r.status == "finished"]
    assert sorted((r.config["hyperparameters"]["scale"], r.seed) for r in records) == [
        (0.5, 0),
        (0.5, 1),
        (1, 0),
        (1, 1),
    ]
    lines = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    seen = {(line["variant"], line["quantity"]): line for line in lines}
    for variant, scale in (("default", 1.0), ("scale=0.5", 0.5), ("scale=1.0", 1.0)):
        chosen = [r.scores["reward/test"] for r in records if r.config["hyperparameters"]["scale"] == scale]
        assert float(seen[variant, "reward"]["mean"]) == pytest.approx(np.mean([s.tuned for s in chosen]))
        assert float(seen[variant, "change"]["mean"]) == pytest.approx(np.mean([s.change for s in chosen]))
        assert seen[variant, "change"]["runs"] == "2"
        assert float(seen[variant, "kl"]["mean"]) > 0
    assert {line["failed"] for line in lines if line["variant"] == "broken=true"} == {"2"}
    assert not {quantity for variant, quantity in seen if variant == "broken=true"} & {"reward", "change", "truth"}

    # The record's command makes the same run.
    words = next(r for r in records if r.config["hyperparameters"]["scale"] == 0.5 and r.seed == 1).command.split()
    assert words[:3] == ["flowbench", "run", "studied"]
    assert words[-2:] == ["--set", "algorithm.scale=0.5"]

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("DONE")}
    assert flowbench_main(*arguments, "--format", "markdown") == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("DONE")} == made
    table = capsys.readouterr().out
    assert "| scale=1.0 (as default) | 2 |" in table
    assert "- failed: broken=true, seed 1: the loss of 'studied' is inf" in table
    assert flowbench_main(*arguments) == 0
    assert "collapsed" in capsys.readouterr().out


def planned(output: Path, **overrides: Any) -> list[Job]:
    """The runs of `studied` that finish."""
    settings = {**SMALL, "training.checkpoint_every": 1, **overrides}
    jobs = all_jobs(plan("studied", settings, 1, **run(output)))
    return [job for job in jobs if "broken" not in job.label]


def test_an_interrupted_study_continues_where_it_stopped(
    clean_registry: None, plugin: Path, tmp_path: Path, read_log: Callable
):
    load_plugin_file(plugin)
    jobs = planned(tmp_path / "parts")

    def stop(log: Any) -> None:
        raise RunInterruptedError("stop")

    def stop_second(job: Job, done: int, total: int) -> Any:
        return nullcontext(Listener(on_iteration=stop if done == 1 else lambda log: None))

    with pytest.raises(RunInterruptedError, match="the same command continues"):
        run_jobs(jobs, StudyListener(on_start=stop_second))
    assert [job.iterations for job in jobs] == [(2, 2), (1, 2)]

    begun: list[tuple[int, int]] = []

    def note(job: Job, done: int, total: int) -> Any:
        return nullcontext(Listener(on_start=lambda *where: begun.append(where)))

    outcomes = run_jobs(jobs, StudyListener(on_start=note))
    assert begun == [(1, 2)]
    for parts, whole in zip(outcomes, run_jobs(planned(tmp_path / "whole"), StudyListener()), strict=True):
        assert read_log(parts.job.folder) == read_log(whole.job.folder)
        assert parts.record.per_prompt == whole.record.per_prompt


def test_runs_in_processes_of_their_own_give_the_same_records(clean_registry: None, plugin: Path, tmp_path: Path):
    load_plugin_file(plugin)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # as in each of two processes
    try:
        alone = run_jobs(planned(tmp_path / "alone"), StudyListener())
    finally:
        torch.set_num_threads(threads)
    ended: list[str] = []
    listener = StudyListener(on_outcome=lambda outcome, done, total: ended.append(outcome.job.label))
    beside = run_jobs(planned(tmp_path / "beside"), listener, workers=2, plugins=[plugin])
    assert sorted(ended) == ["default, seed 0", "scale=0.5, seed 0"]
    for a, b in zip(alone, beside, strict=True):
        assert a.job.label == b.job.label
        assert a.record.per_prompt == b.record.per_prompt


def fake(tmp_path: Path, changed: dict[int, dict[str, Any]], tiny: Any, name: str = "default") -> tuple[Variant, list]:
    """A variant whose runs have these records, by seed; None is a run that failed."""
    jobs = tuple(Job(f"{name}, seed {s}", tiny(reward="clip", seed=s), tmp_path / f"{name}-{s}", "") for s in changed)
    outcomes = [
        Outcome(job, None, "no memory") if values is None else Outcome(job, make_record(seed=job.config.seed, **values))
        for job, values in zip(jobs, changed.values(), strict=True)
    ]
    return Variant(name, jobs, repeats=False), outcomes


def with_scores(truth: float, diversity: float) -> dict[str, Any]:
    """A record's scores: change of the oracle's verdicts, and diversity as a share of the base's."""
    scores = make_record(gain=truth).scores
    return {"scores": {**scores, "diversity/test": Score(base=2.0, tuned=2.0 * diversity, diff_ci95=(0.0, 0.0))}}


def test_runs_count_as_degraded_below_a_truth_of_minus_five_points_and_as_collapsed_below_half_the_diversity(
    tmp_path: Path, tiny_config: Any
):
    values = [(-0.051, 0.9), (-0.049, 0.49), (0.1, 0.51), (-0.3, 0.1)]
    variant, outcomes = fake(tmp_path, dict(enumerate(with_scores(t, d) for t, d in values)) | {9: None}, tiny_config)
    (row,) = rows([variant], outcomes, "test")
    assert (row.runs, row.shares) == (4, {"degraded": 0.5, "collapsed": 0.5})
    assert row.failures == ("seed 9: no memory",)
    assert row.values["truth"].value == pytest.approx(np.mean([t for t, _ in values]))
    truths = [t for t, _ in values]
    ends = stats.t.interval(0.95, 3, np.mean(truths), stats.sem(truths))
    assert (row.values["truth"].low, row.values["truth"].high) == pytest.approx(ends)
    assert row.values["diversity"].value == pytest.approx(0.5)
    assert row.values["reward"].value == pytest.approx(np.mean([0.5 + 2 * t for t, _ in values]))


def test_the_table_says_it_as_text_and_as_numbers(tmp_path: Path, tiny_config: Any):
    variant, outcomes = fake(tmp_path, {0: with_scores(0.1, 0.5), 1: None}, tiny_config)
    table = rows([variant], outcomes, "test")
    assert "| default | 1, 1 failed | 0.700 | +0.200 | +0.100 | 0.500 | 0% | 0% |" in to_markdown(table)
    assert "- failed: default, seed 1: no memory" in to_markdown(table)
    written = {line["quantity"]: line for line in csv.DictReader(io.StringIO(to_csv(table)))}
    assert float(written["truth"]["mean"]) == pytest.approx(0.1)
    assert written["truth"]["low"] == ""


def test_a_study_without_a_single_finished_run_is_an_error(tmp_path: Path, tiny_config: Any):
    variant, outcomes = fake(tmp_path, {0: None, 1: None}, tiny_config)
    with pytest.raises(RunError, match="every run of the study failed; the first: no memory"):
        rows([variant], outcomes, "test")


def test_explained_variance_is_averaged_over_thirds_of_training_buckets_and_seeds(tmp_path: Path, tiny_config: Any):
    variant, outcomes = fake(tmp_path, {0: {}, 1: {}}, tiny_config)
    for shift, job in zip((0.0, 0.2), variant.jobs, strict=True):
        job.folder.mkdir()
        logs = [
            {"images": 8 * k, "reward": k, "metrics": {"explained_variance_0.00": 0.1 * k + shift} if k > 1 else {}}
            for k in range(6)
        ]
        (job.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logs))
    (row,) = rows([variant], outcomes, "test")
    first, middle, last = row.explained
    assert np.isnan(first)
    assert (middle, last) == pytest.approx((0.35, 0.55))
    assert row.curves["reward"].values.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_a_run_that_failed_on_the_way_still_has_a_curve_up_to_there():
    curve = Curve(np.arange(6), np.array([[1.0] * 6, [3.0] * 2 + [np.nan] * 4]))
    assert curve.thirds() == (2.0, 1.0, 1.0)


def test_ablations_are_checked_before_anything_runs(clean_registry: None, tmp_path: Path):
    where = run(tmp_path / "runs")
    with pytest.raises(UsageError, match="not evaluated on 'tset'; did you mean 'test'"):
        plan("acflow", {}, 1, **{**where, "split": "tset"})
    with pytest.raises(UsageError, match="orw-cfm-w2 declares no ablations; add `ablations` to its class"):
        plan("orw-cfm-w2", {}, 1, **where)
    cls = algorithms.get("orw-cfm-w2").cls
    cls.ablations = ({"alfa": 0.0},)
    try:
        with pytest.raises(UsageError, match=r"unknown setting 'algorithm\.alfa'; did you mean 'alpha'"):
            plan("orw-cfm-w2", {}, 1, **where)
    finally:
        del cls.ablations
    assert not (tmp_path / "runs").exists()


def test_ac_flows_ablations_change_one_stabiliser_critic_or_added_device_each(tmp_path: Path):
    variants = plan("acflow", {}, 1, **{**run(tmp_path), "model": "mini-sd3", "reward": "clip"})

    def settings(config: RunConfig) -> dict[str, Any]:
        loop = config.training.model_dump(mode="json")
        return {**config.hyperparameters, **{f"training.{key}": value for key, value in loop.items()}}

    default = settings(variants[0].jobs[0].config)
    assert [v.name for v in variants] == [
        "default",
        "clip=null",
        "warmup=0",
        "shaping=none",
        "alpha=0.0",
        "critic=direct",
        "critic=none",
        "critic=sees",
        "critic=preview",
        "center=false",
        "training.shared_noise=false",
        "w2_every=4",
        "training.anchor_decay=0.95",
        "control_variate=true",
    ]
    for variant in variants[1:]:
        own = settings(variant.jobs[0].config)
        changed = {key for key in default if own[key] != default[key]}
        assert changed == {variant.name.split("=")[0]}, variant.name
