"""Runs on the analytic models: the same commands and the same record as any run, judged by exact points."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.config import resolve_config
from flowbench.evaluation.exact import exact_evaluation, quadratic_form
from flowbench.experiments.run import execute, load_tuned
from flowbench.models.families.plane import exact_field
from flowbench.registry import algorithms
from flowbench.reward import Reward
from flowbench.training.trainer import Trainer

Main = Callable[..., int]
SMALL = ["--set", "training.images=1024", "--set", "evaluation.prompts=4", "--device", "cpu"]
models = pytest.mark.parametrize("model", ["gaussian", "mixture"])


def run(main: Main, model: str, output: Path, *arguments: str) -> Path:
    """The folder of a run of four iterations."""
    where = ["--model", model, "--reward", "linear", "--output", str(output)]
    assert main("run", "orw-cfm-w2", *where, *SMALL, *arguments) == 0
    (record,) = output.rglob("record.json")
    return record.parent


@models
def test_a_run_leaves_its_exact_point_and_the_frontiers_picture(
    flowbench_main: Main, model: str, tmp_path: Path, pictures: Callable
):
    exact_end = ["--set", "training.ema=0"]  # the path is that of the current weights
    with pictures():
        folder = run(flowbench_main, model, tmp_path, "--set", "evaluation.images_per_prompt=512", *exact_end)
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    scores = record["scores"]
    assert scores["kl/test"]["base"] == 0.0
    assert scores["kl/test"]["tuned"] > 0.0
    assert 0.0 < scores["frontier_share/test"]["tuned"] < 1.0
    exact, sampled = scores["reward/test"], scores["linear/test"]
    assert exact["tuned"] > exact["base"]
    error = 5 * 0.9 / math.sqrt(4 * 512)  # r has a deviation of 0.77 and 0.89 on these models
    for side in ("base", "tuned"):
        assert abs(sampled[side] - exact[side]) < error
    for name in ("frontier.png", "curves.png", "DONE", "checkpoints/tuned/transformer/correction.safetensors"):
        assert (folder / name).stat().st_size > 0 or name == "DONE"
    assert not (folder / "samples").exists()
    log = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len([line for line in log if "exact_kl" in line]) == 4
    assert log[-1]["exact_reward"] == pytest.approx(exact["tuned"], abs=2e-3)  # the path's nodes are coarser


def test_a_run_can_be_evaluated_sampled_and_listed(
    flowbench_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = run(flowbench_main, "gaussian", tmp_path)
    scores = json.loads((folder / "record.json").read_text(encoding="utf-8"))["scores"]
    assert flowbench_main("evaluate", folder, "--output", tmp_path / "again.json") == 0
    again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    assert again == scores
    assert flowbench_main("sample", folder, "a point", "--images", "30", "--output", tmp_path / "points.png") == 0
    assert (tmp_path / "points.png").stat().st_size > 0
    capsys.readouterr()
    assert flowbench_main("leaderboard", tmp_path, "--format", "csv") == 0
    metrics = {line["metric"] for line in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert metrics >= {"reward", "kl", "linear"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "gaussian", "--reward", "clip"], "reward 'clip' scores images; model 'gaussian' makes points"),
        (["--model", "mixture", "--reward", "jpeg"], "use 'linear' or 'quadratic'"),
        (["--model", "mini-sd3", "--reward", "linear"], "reward 'linear' scores points; model 'mini-sd3' makes images"),
        (["--model", "gaussian", "--reward", "linear+jpeg"], "they have no sum"),
        (
            ["--model", "gaussian", "--reward", "linear", "--set", "training.tuning=lora"],
            "model 'gaussian' has no layers for LoRA; use training.tuning=full",
        ),
    ],
)
def test_a_reward_of_the_wrong_kind_is_refused_in_one_line(
    flowbench_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    complaint: str,
):
    monkeypatch.setattr("flowbench.experiments.run.occupied", lambda *_: pytest.fail("something was begun"))
    assert flowbench_main("run", "acflow", *arguments, "--output", tmp_path) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert len(error.splitlines()) == 1


def test_only_runs_of_an_analytic_model_are_evaluated(
    flowbench_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert flowbench_main("evaluate", tmp_path, "--model", "gaussian") == 2
    assert "only runs are evaluated" in capsys.readouterr().err


def test_the_exact_path_survives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Interrupted after two of four iterations and resumed: the same log and the same record."""
    overrides = {"training.images": 1024, "evaluation.prompts": 4, "training.checkpoint_every": 1}
    config = resolve_config("orw-cfm-w2", "linear", "gaussian", overrides=overrides, device="cpu")
    whole = execute(config, tmp_path / "whole", "", resume=False)

    def stop(trainer: Trainer) -> None:
        if trainer.iteration == 2:
            raise KeyboardInterrupt
        iterate(trainer)

    iterate = Trainer._iterate
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_iterate", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(config, tmp_path / "parts", "", resume=False)
    parts = execute(config, tmp_path / "parts", "", resume=True)
    assert parts.scores == whole.scores
    logs = [(tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8") for name in ("whole", "parts")]
    first, second = ([json.loads(line)["metrics"] for line in log.splitlines()] for log in logs)
    assert first == second


def test_the_tuned_weights_of_a_run_are_found_again(flowbench_main: Main, tmp_path: Path):
    folder = run(flowbench_main, "mixture", tmp_path)
    policy, _ = load_tuned(folder, torch.device("cpu"))
    x, sigma, cond = policy.draw_noise(3), torch.rand(3), policy.encode(["p"] * 3)
    current, reference = (policy.velocity(x, sigma, cond, w) for w in ("current", "reference"))
    assert not torch.allclose(current, reference, atol=1e-4)


# 24 iterations of 256 points, with fewer sampler steps than by default.
@pytest.mark.parametrize("name", algorithms.names())
@models
def test_no_algorithm_passes_the_frontier(
    make_analytic_trainer: Callable[..., Trainer], point_reward: Callable[..., Reward], name: str, model: str
):
    """Its exact point against the exact frontier: no sampling error is left.

    On the mixture, the nodes' error of 1 % of the KL is allowed, which is half of that in the gain.
    """
    overrides: dict[str, Any] = {"training__images": 24 * 256, "training__num_steps": 10}
    trainer = make_analytic_trainer(name, model, **overrides)
    trainer.run()
    policy = trainer.policy
    evaluation = exact_evaluation(policy, quadratic_form(point_reward("linear", model)), num_steps=20, spacing=0.25)
    point = evaluation.point(exact_field(policy))
    assert point is not None
    assert point.kl > 1e-5  # it has moved
    edge = evaluation.frontier(point.kl)
    assert point.reward > edge.base
    assert point.reward - edge.base <= edge.gain(point.kl) * (1 + (1e-9 if model == "gaussian" else 5e-3))


def test_the_documentations_model_file_is_a_model(flowbench_main: Main, tmp_path: Path):
    page = (Path(__file__).parents[2] / "docs" / "analytic.md").read_text(encoding="utf-8")
    file = tmp_path / "two.yaml"
    file.write_text(page.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    folder = run(flowbench_main, str(file), tmp_path / "runs", "--set", "evaluation.images_per_prompt=2")
    assert (folder / "DONE").exists()
