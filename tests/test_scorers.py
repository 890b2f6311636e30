from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flowbench.config import RunConfig, resolve_config
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.judges import build_judges, build_reward
from flowbench.evaluation.protocol import protocol_hash
from flowbench.experiments.run import execute
from flowbench.models.presets import load_preset
from flowbench.prompts import load_split
from flowbench.record import load_record
from flowbench.reward import Reward, register_reward

CPU = torch.device("cpu")
CLIP = {"model": "embedded:mini-clip"}
SMALL = {"training.images": 16, "training.prompts_per_iteration": 4, "training.images_per_prompt": 4}
SMALL |= {"evaluation.prompts": 2, "evaluation.images_per_prompt": 2, "evaluation.splits": ["test"]}


@pytest.fixture
def judged(preset_file: str, tmp_path: Path, clean_registry: None) -> Callable[..., RunConfig]:
    """The configuration of a run on a model whose preset configures these rewards."""

    @register_reward("shade", source="tests", licence="none", range=(0.0, 1.0), differentiable=True)
    class Shade(Reward):
        """Brightness, with weights that a name decides."""

        def __init__(self, weights: str = "a") -> None:
            self.identity = weights

        def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
            return images.mean((1, 2, 3))

        def provenance(self) -> dict[str, Any]:
            return {"sha256": self.identity}

    @register_reward("tint", source="tests", licence="none", range=(0.0, 1.0), differentiable=True)
    class Tint(Shade):
        """The mean of blue."""

        def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
            return images[:, 2].mean((1, 2))

    def make(reward: str, rewards: dict[str, Any], **overrides: Any) -> RunConfig:
        content = yaml.safe_load(Path(preset_file).read_text(encoding="utf-8")) | {"rewards": rewards}
        path = tmp_path / "judged.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        settings = {key.replace("__", "."): value for key, value in overrides.items()}
        return resolve_config("orw-cfm-w2", reward, str(path), overrides={**SMALL, **settings}, device="cpu")

    return make


def judges_of(config: RunConfig) -> Any:
    preset = load_preset(config.model)
    return build_judges(config, build_reward(config.reward, preset, CPU), preset, CPU)


BOTH = {"shade": {"weights": "a"}, "tint": {"weights": "b"}}


def test_default_judges_are_all_of_the_models_rewards_but_those_trained_on(judged: Callable[..., RunConfig]):
    judges = judges_of(judged("jpeg", BOTH))
    assert list(judges.rewards) == ["jpeg", "shade", "tint"]
    assert judges.held_out == ("shade", "tint")
    assert judges.oracle
    judges = judges_of(judged("shade", BOTH))
    assert list(judges.rewards) == ["shade", "tint"]
    assert judges.held_out == ("tint",)


def test_no_part_of_a_sum_is_a_judge_and_each_is_reported(judged: Callable[..., RunConfig]):
    judges = judges_of(judged("shade:0.5+jpeg:0.5", BOTH))
    assert set(judges.rewards) == {"shade", "jpeg", "tint"}
    assert judges.held_out == ("tint",)


def test_the_truth_is_reported_as_the_oracles_verdicts_even_when_it_is_trained_on(judged: Callable[..., RunConfig]):
    judges = judges_of(judged("oracle", BOTH))
    assert judges.held_out == ("shade", "tint")
    assert set(judges.rewards) == {"shade", "tint"}
    assert judges.oracle


@pytest.mark.parametrize("reward", ["shade", "shade:0.5+jpeg:0.5"])
def test_a_judge_that_is_trained_on_is_refused_with_the_reason(reward: str, judged: Callable[..., RunConfig]):
    with pytest.raises(
        UsageError, match="the run trains on 'shade', so it cannot be a judge: it would praise"
    ) as raised:
        judged(reward, BOTH, evaluation__judges=["tint", "shade"])
    assert len(str(raised.value).splitlines()) == 1


def test_an_unknown_judge_is_answered_with_the_nearest_name(judged: Callable[..., RunConfig]):
    with pytest.raises(UsageError, match="unknown reward 'tnit'; did you mean 'tint'"):
        judged("jpeg", BOTH, evaluation__judges=["tnit"])


def test_named_judges_are_those_and_no_others(judged: Callable[..., RunConfig]):
    judges = judges_of(judged("jpeg", BOTH, evaluation__judges=["tint"]))
    assert judges.held_out == ("tint",)
    assert not judges.oracle
    assert judges_of(judged("jpeg", BOTH, evaluation__judges=["oracle"])).oracle
    assert judges_of(judged("jpeg", BOTH, evaluation__judges=[])).held_out == ()


def test_the_same_weights_under_another_name_are_no_judge(
    judged: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
):
    same = {"shade": {"weights": "a"}, "tint": {"weights": "a"}}
    with caplog.at_level(logging.WARNING, "flowbench"):
        assert judges_of(judged("shade", same)).held_out == ()
    assert "'tint' is no judge of this run: it has the same weights as reward 'shade'" in caplog.text
    with pytest.raises(
        UsageError, match="judge 'tint' has the same weights as reward 'shade', which the run trains on"
    ):
        judges_of(judged("shade+jpeg", same, evaluation__judges=["tint"]))


def test_a_real_checkpoint_is_known_again_by_its_weights(judged: Callable[..., RunConfig]):
    """mini-clip as the reward `clip`, and the same file as the reward `hpsv2`."""
    with pytest.raises(UsageError, match="judge 'hpsv2' has the same weights as reward 'clip'"):
        judges_of(judged("clip", {"clip": CLIP, "hpsv2": CLIP}, evaluation__judges=["hpsv2"]))


def test_a_missing_judge_that_was_asked_for_costs_no_training(judged: Callable[..., RunConfig], tmp_path: Path):
    config = judged("jpeg", {"clip": {"model": "embedded:absent"}}, evaluation__judges=["clip"])
    with pytest.raises(RunError, match=r"reward 'clip' has no weights in .*absent; rebuild them with"):
        execute(config, tmp_path / "run", "", resume=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


MISSING = {
    "clip": {"model": "embedded:absent"},
    "hpsv2": {},
    "imagereward": {},
    "pickscore": {},
    "aesthetic": {},
    "vqa": {},
}


def test_default_judges_that_are_not_here_are_left_out_with_the_remedy_and_without_a_download(
    judged: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def connect(*_: Any) -> None:
        raise AssertionError("a network was asked")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setenv("FLOWBENCH_WEIGHTS", str(tmp_path))
    judges = judges_of(judged("jpeg", {**MISSING, **BOTH}))
    assert judges.held_out == ("shade", "tint")
    assert len(caplog.records) == len(MISSING)
    for name, record in zip(MISSING, caplog.records, strict=True):
        message = record.getMessage()
        assert message.startswith(f"'{name}' is no judge of this run: its weights are not on this machine; ")
        assert len(message.splitlines()) == 1


def test_the_record_names_the_judges_and_what_identifies_them(judged: Callable[..., RunConfig], tmp_path: Path):
    record = execute(judged("shade", BOTH), tmp_path / "run", "", resume=False)
    assert record.judges == {"tint": {"sha256": "b"}}
    assert {"shade/test", "tint/test", "oracle_soft/test"} <= set(record.scores)
    assert load_record(tmp_path / "run" / "record.json") == record


def test_records_from_before_there_were_judges_keep_their_hashes(scheduler_grid: None):
    for path in (Path(__file__).parent.parent / "leaderboard" / "history").rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "judges" not in content:
            record = load_record(path)
            config = RunConfig.model_validate(record.config)
            assert config.hash() == record.config_hash, path
            splits = [load_split("shapes", name) for name in config.evaluation.splits]
            assert protocol_hash(config.evaluation, splits, version=1) == record.protocol_hash, path


def test_choosing_judges_is_another_protocol(judged: Callable[..., RunConfig]):
    plain, chosen = (judged("jpeg", BOTH, **more) for more in ({}, {"evaluation__judges": ["tint"]}))
    split = [load_split("shapes", "test")]
    assert protocol_hash(plain.evaluation, split) != protocol_hash(chosen.evaluation, split)
