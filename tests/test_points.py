"""Scores on split dev at points of the budget, which leave no trace in what is trained."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import flowbench
from flowbench.config import RunConfig, resolve_config
from flowbench.errors import RunError, RunInterruptedError, UsageError
from flowbench.evaluation.album import KeptImage
from flowbench.evaluation.dev import DevScores, ImageDev, dev_split
from flowbench.evaluation.judges import build_judges, build_reward
from flowbench.experiments.kept import table as images_table
from flowbench.experiments.outcome import failed_record
from flowbench.experiments.run import Listener, execute
from flowbench.models.policy import Policy
from flowbench.models.presets import ModelPreset, load_preset
from flowbench.prompts import Prompt
from flowbench.record import Point, load_record
from flowbench.training.points import Points, read_points
from flowbench.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
ReadLog = Callable[[Path], list[dict[str, Any]]]

CPU = torch.device("cpu")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_config: MakeConfig) -> Any:
    """The same run with two points and without, and what the first told of them."""
    folder, told = tmp_path_factory.mktemp("points"), []
    settings = {"training.ema": 0.5, "evaluation.judges": ["clip", "oracle"], "evaluation.base_cache": False}
    settings["evaluation.splits"] = ["dev"]
    observed = {"evaluation.points": 2, "evaluation.keep_images": True}
    configs = [tiny_config("orw-cfm-w2", seed=3, overrides={**settings, **more}) for more in (observed, {})]
    assert configs[0].hash() == configs[1].hash()
    listener = Listener(on_point=told.append)
    records = [execute(c, folder / name, "", False, listener) for c, name in zip(configs, ("with", "out"), strict=True)]
    return folder, records, told


def test_points_change_nothing_of_the_run(runs: Any, read_log: ReadLog):
    folder, (record, without), _ = runs
    assert read_log(folder / "with") == read_log(folder / "out")
    assert record.scores == without.scores
    failed = failed_record(RunConfig.model_validate(record.config), "", "")
    assert record.identity == without.identity == failed.identity
    assert record.protocol_hash == without.protocol_hash
    assert without.points == ()
    assert without.dev_base == {}


def test_points_score_the_averaged_policy_and_the_base_model_on_the_way(runs: Any):
    folder, (record, _), told = runs
    assert [(p.images, p.iteration) for p in record.points] == [(16, 1), (32, 2)]
    assert [p.iteration for p in told] == [line["iteration"] for line in lines(folder / "with")] == [0, 1, 2]
    assert {"jpeg", "clip", "oracle_exact", "oracle_soft", "w2", "diversity"} == {*record.dev_base}
    first, last = record.points
    assert record.dev_base["w2"] == 0 < first.scores["w2"] < last.scores["w2"]
    # four sampler steps of 16 images, and of the update forward passes of policy and reference for 16 rows
    assert first.function_evaluations == 16 * 4 + 2 * 16
    assert first.per_prompt == {}
    assert {*last.per_prompt} == {"jpeg", "oracle_exact", "oracle_soft"}
    assert sum(last.per_prompt["jpeg"]) / 4 == pytest.approx(last.scores["jpeg"])
    # SMALL has as many images per prompt in the evaluation as a point has, and the noise is the same.
    for metric in record.dev_base:
        assert record.scores[f"{metric}/dev"].tuned == pytest.approx(last.scores[metric], rel=1e-5)
        assert record.scores[f"{metric}/dev"].base == pytest.approx(record.dev_base[metric], rel=1e-5)
    assert load_record(folder / "with" / "record.json") == record


def test_costs_are_counted_by_purpose_and_part(runs: Any):
    folder, (record, _), _ = runs
    costs, images = record.costs, 4 * 2  # prompts x images per prompt
    assert costs.function_evaluations == {
        "sampling": 32 * 4,
        "training": 32,
        "backward": 32,
        "reference": 32,
        # base and two points: four steps each, and of each prompt's first image w2 at five sigmas with both views
        "dev": 3 * images * 4 + 2 * 4 * 5 * 2,
        "evaluation": 2 * images * 4 + 4 * 5 * 2,
    }
    spent = record.budget
    forward = sum(costs.function_evaluations[purpose] for purpose in ("sampling", "training", "reference"))
    assert spent.function_evaluations == forward
    assert (costs.images, costs.reward_calls, costs.updates) == (32, 32, 4)
    assert {"rollout", "decode", "reward", "prepare", "update", "dev", "evaluation"} <= {*costs.seconds}
    in_training = [s for part, s in costs.seconds.items() if part not in ("dev", "evaluation")]
    assert 0.5 * spent.seconds < sum(in_training) <= spent.seconds
    assert costs.seconds["dev"] == pytest.approx(sum(line["dev_seconds"] for line in lines(folder / "with")))
    assert costs.flops is not None
    assert 1e7 < costs.flops / (forward + 2 * 32) < 1e8  # a backward pass is about two forward ones
    assert (costs.device, costs.precision) == (record.device, "float32")


def test_kept_images_have_a_table_with_every_score_and_an_evaluation_again_makes_the_same(
    runs: Any, flowbench_main: Callable[..., int], preset: ModelPreset
):
    folder, (record, _), _ = runs
    place = folder / "with" / "images"
    table = (place / "images.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(table.splitlines()))
    names = [f"dev/{model}/{p:04d}-{k}.png" for model in ("base", "tuned") for p in range(4) for k in range(2)]
    assert [row["file"] for row in rows] == names
    assert sorted(path.relative_to(place).as_posix() for path in place.rglob("*.png")) == names
    for metric in ("jpeg", "clip", "oracle_exact", "oracle_soft"):
        for model in ("base", "tuned"):
            each = [float(row[metric]) for row in rows if row["model"] == model]
            assert sum(each) / 8 == pytest.approx(getattr(record.scores[f"{metric}/dev"], model), rel=1e-5)
    assert [row["prompt"] for row in rows[8::2]] == record.prompts["dev"]
    assert {row["noise_seed"] for row in rows} == {str(RunConfig.model_validate(record.config).protocol().seed)}
    with Image.open(place / names[0]) as picture:
        assert picture.size == (preset.width, preset.height)
    assert not (folder / "out" / "images").exists()

    (place / "dev" / "tuned" / "0009-0.png").touch()  # of an earlier evaluation of more prompts
    assert flowbench_main("evaluate", folder / "with", "--keep-images", "--device", "cpu") == 0
    assert (place / "images.csv").read_text(encoding="utf-8") == table
    assert len([*place.rglob("*.png")]) == 16


def test_images_are_kept_only_where_there_are_some_and_a_place_for_them(tmp_path: Path):
    with pytest.raises(UsageError, match="'gaussian' makes points and no images; leave out --keep-images"):
        resolve_config("raft", "linear", "gaussian", overrides={"evaluation.keep_images": True})
    with pytest.raises(UsageError, match="no run folder: say with --output where"):
        flowbench.evaluate(tmp_path, keep_images=True)


def test_a_prompt_in_the_table_of_images_is_no_formula():
    image = KeptImage("test/base/0000-0.png", "test", "base", 1.0, 0, 0, Prompt("=1+1, a sum"), {"clip": 0.25})
    (row,) = csv.DictReader(images_table([image], 7).splitlines())
    assert (row["prompt"], row["clip"], row["noise_seed"]) == ("'=1+1, a sum", "0.25", "7")


class Weights:
    """In place of scores the first trained number; fails once where it is told to."""

    def __init__(self, trainer: Trainer, fails: int | None = None) -> None:
        self.trainer, self.fails, self.calls = trainer, fails, 0

    def base(self) -> DevScores:
        return DevScores({"first": math.nan}, {})

    def current(self) -> DevScores:
        self.calls += 1
        if self.trainer.iteration == self.fails:
            raise RunError("no memory for the judge")
        return DevScores({"first": self.trainer.updater.parameters[0].flatten()[0].item()}, {"first": [1.0]})


def test_an_interrupted_run_measures_each_point_once_and_the_same(
    tmp_path: Path, tiny_config: MakeConfig, make_trainer: Callable[..., Trainer]
):
    config = tiny_config("orw-cfm-w2", overrides={"training.images": 48, "training.ema": 0.5})

    def make(folder: str, fails: int | None = None, stop: int | None = None) -> Trainer:
        trainer = make_trainer(config, tmp_path / folder)
        trainer.points = Points(Weights(trainer, fails), trainer.policy, 3, 3, tmp_path / folder)
        trainer.on_iteration = lambda log: setattr(trainer.stop, "made", log.iteration == stop)
        return trainer

    whole = make("whole")
    whole.run()
    averages = [point.scores["first"] for point in whole.points.reached]
    assert len({*averages}) == 3
    assert averages[-1] == whole.updater.average.weights[0].flatten()[0].item()
    assert averages[-1] != whole.updater.parameters[0].flatten()[0].item()
    assert [bool(point.per_prompt) for point in whole.points.reached] == [False, False, True]

    calls = 0
    for fails, stop, error in ((1, None, RunError), (None, 2, RunInterruptedError), (None, None, None)):
        parts = make("parts", fails, stop)
        assert parts.resume() == bool(calls)
        with pytest.raises(error) if error else nullcontext():
            parts.run()
        calls += parts.points.scorer.calls
    assert calls == 3 + 1  # the one that failed was tried again
    told = [[(p.iteration, p.scores["first"]) for p in trainer.points.reached] for trainer in (parts, whole)]
    assert told[0] == told[1]
    assert math.isnan(parts.points.base["first"])
    assert not any((a != b).any() for a, b in zip(parts.updater.parameters, whole.updater.parameters, strict=True))


def test_prompts_without_dev_are_said_and_no_error(tiny_config: MakeConfig, caplog: pytest.LogCaptureFixture):
    config = tiny_config(overrides={"evaluation.points": 5}).model_copy(update={"prompts": "objects"})
    assert dev_split(config, load_preset(config.model)) is None
    assert "prompts 'objects' have no split 'dev'" in caplog.text
    caplog.clear()
    assert dev_split(tiny_config(), load_preset(config.model)) is None  # no points, so no word
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["oracle", "clip:2+jpeg:-1"])
def test_the_reward_trained_on_has_a_score_of_its_name_and_scoring_leaves_no_trace(
    name: str, shared_policy: Policy, tiny_config: MakeConfig, preset: ModelPreset
):
    overrides = {"evaluation.points": 1, "evaluation.judges": [], "evaluation.prompts": 2}
    config = tiny_config("raft", name, overrides=overrides)
    reward, split = build_reward(name, preset, CPU), dev_split(config, preset)
    assert split is not None
    scorer = ImageDev(shared_policy, reward, build_judges(config, reward, preset, CPU), config, split, "shapes")
    generator, texts, state = shared_policy.generator, shared_policy.texts, torch.get_rng_state()
    before = generator.get_state()
    scores = scorer.current().means
    if name == "oracle":
        assert scores["oracle"] == pytest.approx((scores["oracle_exact"] + scores["oracle_soft"]) / 2)
    else:
        assert scores["clip-2+jpeg--1"] == pytest.approx(2 * scores["clip"] - scores["jpeg"], rel=1e-5)
    assert (shared_policy.generator, shared_policy.texts) == (generator, texts)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_on_the_plane_points_are_exact(tmp_path: Path):
    settings = {"training.images": 32, "training.prompts_per_iteration": 2, "evaluation.prompts": 2}
    settings["evaluation.points"] = 1
    config = resolve_config("orw-cfm-w2", "linear", "gaussian", overrides=settings, device="cpu")
    record = execute(config, tmp_path, "", False)
    last = record.points[-1].scores
    for metric in ("reward", "kl", "frontier_share"):
        assert last[metric] == record.scores[f"{metric}/test"].tuned
        assert record.dev_base[metric] == pytest.approx(record.scores[f"{metric}/test"].base)
    assert last["linear"] == last["reward"]
    assert last["diversity"] > 0 < record.dev_base["diversity"]


def test_a_torn_line_ends_what_is_read(tmp_path: Path):
    assert read_points(tmp_path / "points.jsonl") == []
    line = '{"images":8,"iteration":1,"seconds":1.0,"function_evaluations":4,"scores":{"clip":0.5},'
    line += '"dev_seconds":1.0,"dev_function_evaluations":8}\n'
    (tmp_path / "points.jsonl").write_text(line + line[:40], encoding="utf-8")
    (point,) = read_points(tmp_path / "points.jsonl")
    assert point.plain == Point(images=8, iteration=1, seconds=1.0, function_evaluations=4, scores={"clip": 0.5})


def test_block_0_of_the_noise_is_the_protocols_own_and_every_method_has_the_same_blocks(tiny_config: MakeConfig):
    first, other = (tiny_config("orw-cfm-w2", seed=seed) for seed in (0, 1))
    assert first.protocol() == first.evaluation
    assert other.protocol() == tiny_config("raft", seed=1).protocol() != other.evaluation
