"""Scores on split dev at points of the budget, which leave no trace in what is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowbench.config import RunConfig, resolve_config
from flowbench.errors import RunInterruptedError
from flowbench.evaluation.dev import dev_split
from flowbench.experiments.run import Listener, execute
from flowbench.models.presets import load_preset
from flowbench.record import Point, Record, load_record
from flowbench.training.points import Points, read_points
from flowbench.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
ReadLog = Callable[[Path], list[dict[str, Any]]]

SETTINGS = {"training.images": 64, "training.ema": 0.5, "evaluation.judges": ["clip", "oracle"]}


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]


def timeless(point: Point) -> dict[str, Any]:
    return point.model_dump(exclude={"seconds", "dev_seconds", "dev_function_evaluations"})


def test_points_are_scored_on_the_way_and_change_nothing_of_the_run(
    tmp_path: Path, tiny_config: MakeConfig, read_log: ReadLog
):
    told: list[Point] = []
    settings = {**SETTINGS, "evaluation.splits": ["test", "dev"]}
    config = tiny_config("orw-cfm-w2", seed=3, overrides={**settings, "evaluation.points": 2})
    record = execute(config, tmp_path / "with", "", False, Listener(on_point=told.append))
    plain = tiny_config("orw-cfm-w2", seed=3, overrides=settings)
    assert config.hash() == plain.hash()
    without = execute(plain, tmp_path / "without", "", False)

    assert read_log(tmp_path / "with") == read_log(tmp_path / "without")
    assert record.scores == without.scores
    assert record.identity == without.identity
    assert record.protocol_hash == without.protocol_hash
    assert without.points == ()
    assert without.dev_base == {}

    assert [(p.images, p.iteration) for p in record.points] == [(32, 2), (64, 4)]
    assert [p.iteration for p in told] == [0, 2, 4]
    assert {"jpeg", "clip", "oracle_exact", "oracle_soft", "w2", "diversity"} == {*record.dev_base}
    assert record.dev_base["w2"] == 0 < record.points[0].scores["w2"] < record.points[1].scores["w2"]
    # four sampler steps of 32 images, and of the update forward passes of policy and reference for 32 rows
    assert record.points[0].function_evaluations == 32 * 4 + 2 * 32
    assert record.points[0].per_prompt == {}
    last = record.points[1]
    assert {*last.per_prompt} == {"jpeg", "oracle_exact", "oracle_soft"}
    assert sum(last.per_prompt["jpeg"]) / 4 == pytest.approx(last.scores["jpeg"])
    # SMALL has as many images per prompt in the evaluation as a point has, and the noise is the same.
    for metric in record.dev_base:
        assert record.scores[f"{metric}/dev"].tuned == pytest.approx(last.scores[metric], rel=1e-5)
        assert record.scores[f"{metric}/dev"].base == pytest.approx(record.dev_base[metric], rel=1e-5)
    assert load_record(tmp_path / "with" / "record.json") == record


def test_costs_are_counted_by_purpose_and_part(tmp_path: Path, tiny_config: MakeConfig):
    config = tiny_config("orw-cfm-w2", overrides={**SETTINGS, "evaluation.points": 2, "evaluation.judges": []})
    record = execute(config, tmp_path, "", False)
    costs, images = record.costs, 4 * 2  # prompts x images per prompt
    assert costs.function_evaluations == {
        "sampling": 64 * 4,
        "training": 64,
        "backward": 64,
        "reference": 64,
        # base and two points: four steps each, and of each prompt's first image w2 at five sigmas with both views
        "dev": 3 * images * 4 + 2 * 4 * 5 * 2,
        "evaluation": 2 * images * 4 + 4 * 5 * 2,
    }
    spent = record.budget
    forward = sum(costs.function_evaluations[purpose] for purpose in ("sampling", "training", "reference"))
    assert spent.function_evaluations == forward
    assert (costs.images, costs.reward_calls, costs.updates) == (64, 64, 8)
    assert {"rollout", "decode", "reward", "prepare", "update", "dev", "evaluation"} <= {*costs.seconds}
    in_training = [s for part, s in costs.seconds.items() if part not in ("dev", "evaluation")]
    assert 0.5 * spent.seconds < sum(in_training) <= spent.seconds
    assert costs.seconds["dev"] == pytest.approx(sum(line["dev_seconds"] for line in lines(tmp_path)))
    assert costs.flops is not None
    assert 1e8 < costs.flops / (forward + 2 * 64) < 1e9  # a backward pass is about two forward ones
    assert (costs.device, costs.precision) == (record.device, "float32")


def test_an_interrupted_run_measures_each_point_once_and_ends_with_the_same(
    tmp_path: Path, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config("orw-cfm-w2", overrides={**SETTINGS, "evaluation.points": 4, "evaluation.judges": []})
    whole = execute(config, tmp_path / "whole", "", False)
    measure, measured = Points.measure, []

    def brittle(self: Points, iteration: int, *rest: Any) -> None:
        if iteration == 2 and 2 not in measured:
            measured.append(2)
            raise KeyboardInterrupt
        measured.append(iteration)
        measure(self, iteration, *rest)

    monkeypatch.setattr(Points, "measure", brittle)
    with pytest.raises(KeyboardInterrupt):
        execute(config, tmp_path / "parts", "", False)
    stop, iterate = [3], Trainer._iterate

    def stopped(self: Trainer) -> None:
        iterate(self)
        self.stop.made = self.iteration in stop

    monkeypatch.setattr(Trainer, "_iterate", stopped)
    with pytest.raises(RunInterruptedError, match="after iteration 3 of 4"):
        execute(config, tmp_path / "parts", "", True)
    stop.clear()
    resumed = execute(config, tmp_path / "parts", "", True)
    assert measured == [0, 1, 2, 2, 3, 4]
    assert [timeless(p) for p in resumed.points] == [timeless(p) for p in whole.points]
    assert resumed.dev_base == whole.dev_base
    assert resumed.costs.function_evaluations == whole.costs.function_evaluations
    assert resumed.scores == whole.scores


def test_prompts_without_dev_are_said_and_no_error(
    tmp_path: Path, tiny_config: MakeConfig, caplog: pytest.LogCaptureFixture
):
    config = tiny_config(overrides={"evaluation.points": 5}).model_copy(update={"prompts": "objects"})
    assert dev_split(config, load_preset(config.model)) is None
    assert "prompts 'objects' have no split 'dev'" in caplog.text
    caplog.clear()
    assert dev_split(tiny_config(), load_preset(config.model)) is None  # no points, so no word
    assert caplog.text == ""


@pytest.mark.parametrize(("reward", "parts"), [("oracle", ("oracle_exact", "oracle_soft")), ("clip:2+jpeg:-1", ())])
def test_the_reward_trained_on_has_a_score_of_its_name(
    reward: str, parts: tuple[str, ...], tmp_path: Path, tiny_config: MakeConfig
):
    overrides = {"training.images": 16, "evaluation.points": 1, "evaluation.judges": ["oracle"]}
    config = tiny_config("raft", reward, overrides=overrides)
    record = execute(config, tmp_path, "", False)
    scores = record.points[0].scores
    if parts:
        assert scores["oracle"] == pytest.approx((scores["oracle_exact"] + scores["oracle_soft"]) / 2)
    else:
        assert scores["clip-2+jpeg--1"] == pytest.approx(2 * scores["clip"] - scores["jpeg"], rel=1e-5)


@pytest.mark.parametrize("model", ["gaussian", "mixture"])
def test_on_the_plane_points_are_exact(model: str, tmp_path: Path):
    overrides = {"training.images": 64, "training.prompts_per_iteration": 2, "evaluation.prompts": 2}
    config = resolve_config(
        "orw-cfm-w2", "linear", model, overrides={**overrides, "evaluation.points": 2}, device="cpu"
    )
    record = execute(config, tmp_path, "", False)
    assert [p.images for p in record.points] == [32, 64]
    last = record.points[-1].scores
    for metric in ("reward", "kl", "frontier_share"):
        assert last[metric] == record.scores[f"{metric}/test"].tuned
        assert record.dev_base[metric] == record.scores[f"{metric}/test"].base
    assert last["linear"] == last["reward"]
    assert last["diversity"] > 0 < record.dev_base["diversity"]


def test_a_torn_line_ends_what_is_read(tmp_path: Path):
    assert read_points(tmp_path / "points.jsonl") == []
    line = '{"images":8,"iteration":1,"seconds":1.0,"function_evaluations":4,"scores":{"clip":0.5},'
    line += '"dev_seconds":1.0,"dev_function_evaluations":8}\n'
    (tmp_path / "points.jsonl").write_text(line + line[:40], encoding="utf-8")
    (point,) = read_points(tmp_path / "points.jsonl")
    assert point.plain == Point(images=8, iteration=1, seconds=1.0, function_evaluations=4, scores={"clip": 0.5})


def test_seeds_are_evaluated_on_noise_of_their_own_and_seed_0_on_the_protocols(tmp_path: Path, tiny_config: MakeConfig):
    first, other = (tiny_config("orw-cfm-w2", seed=seed) for seed in (0, 1))
    assert first.protocol() == first.evaluation
    assert other.protocol() == tiny_config("raft", seed=1).protocol() != other.evaluation
    records: list[Record] = []
    for config in (first, other):
        overrides = {"training.images": 16, "evaluation.judges": [], "evaluation.prompts": 2}
        brief = tiny_config("orw-cfm-w2", seed=config.seed, overrides=overrides)
        records.append(execute(brief, tmp_path / str(config.seed), "", False))
    assert records[0].scores["oracle_soft/test"].base != records[1].scores["oracle_soft/test"].base
    assert records[0].protocol_hash == records[1].protocol_hash
    assert records[0].identity == records[1].identity
