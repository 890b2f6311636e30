"""What is on the device when: judges one at a time, a reward that rests, evaluations in portions.

The device "meta" stands in a GPU's place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flowbench.config import EvaluationConfig, RunConfig, resolve_config
from flowbench.errors import RunError
from flowbench.evaluation.judges import build_judges, build_reward, training_reward
from flowbench.evaluation.pairs import evaluate_pairs
from flowbench.evaluation.protocol import Judges, decode_batch, protocol_hash, score_split
from flowbench.models.policy import Policy
from flowbench.models.presets import load_preset
from flowbench.prompts import load_split
from flowbench.reward import Reward, register_reward

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = {"training.images": 16, "training.prompts_per_iteration": 4, "training.images_per_prompt": 4}
SMALL |= {"evaluation.prompts": 2, "evaluation.images_per_prompt": 2, "evaluation.splits": ["test"]}


class Stage:
    """A device's place: what is on it, and the most that ever was."""

    def __init__(self) -> None:
        self.present: set[str] = set()
        self.seen: list[frozenset[str]] = []

    def move(self, name: str, device: torch.device) -> None:
        (self.present.discard if device.type == "cpu" else self.present.add)(name)
        self.seen.append(frozenset(self.present))


@pytest.fixture
def stage(clean_registry: None) -> Stage:
    """Two rewards that tell it where they are."""
    stage = Stage()

    def define(name: str) -> None:
        @register_reward(name, source="tests", licence="none", range=(0.0, 1.0), differentiable=True)
        class Actor(Reward):
            def load(self, device: torch.device) -> None:
                stage.move(name, device)

            def to(self, device: torch.device) -> None:
                stage.move(name, device)

            def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
                assert name in stage.present
                return images.mean((1, 2, 3))

            def provenance(self) -> dict[str, Any]:
                return {"sha256": name}

    for name in ("first", "second"):
        define(name)
    return stage


def staged(preset_file: str, tmp_path: Path, reward: str = "jpeg", **overrides: Any) -> RunConfig:
    content = yaml.safe_load(Path(preset_file).read_text(encoding="utf-8")) | {"rewards": {"first": {}, "second": {}}}
    path = tmp_path / "staged.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return resolve_config("orw-cfm-w2", reward, str(path), overrides={**SMALL, **overrides}, device="cpu")


def test_judges_are_seen_before_training_and_then_on_the_device_one_at_a_time(
    preset_file: str, tmp_path: Path, stage: Stage, shared_policy: Policy
):
    config = staged(preset_file, tmp_path)
    preset = load_preset(config.model)
    judges = build_judges(config, build_reward("jpeg", preset, CPU), preset, META)
    assert judges.held_out == ("first", "second")
    assert [judges.rewards[name].provenance() for name in judges.held_out] == [{"sha256": n} for n in judges.held_out]
    assert stage.seen == [frozenset(), frozenset()]  # each was loaded once, on the CPU
    assert all(judges.rewards[name].reward is None for name in judges.held_out)
    protocol = EvaluationConfig(prompts=2, images_per_prompt=2, num_steps=1, batch=3)
    pairs = evaluate_pairs(shared_policy, [load_split("shapes", "test")], judges, protocol, lambda done, total: None)
    assert {"first", "second"} <= set(pairs["test"].tuned.scores)
    assert max(map(len, stage.seen)) == 1
    assert stage.present == set()
    assert all(judges.rewards[name].reward is None for name in judges.held_out)


def test_a_judge_that_cannot_be_loaded_is_known_before_training_on_a_gpu_too(preset_file: str):
    preset = load_preset(preset_file).model_copy(update={"rewards": {"clip": {"model": "embedded:absent"}}})
    config = resolve_config("orw-cfm-w2", "jpeg", preset_file, overrides={**SMALL, "evaluation.judges": ["clip"]})
    with pytest.raises(RunError, match=r"reward 'clip' has no weights in .*absent"):
        build_judges(config, build_reward("jpeg", preset, CPU), preset, META)


def test_a_training_reward_that_is_offloaded_is_on_the_device_only_while_it_scores(
    preset_file: str, tmp_path: Path, stage: Stage, make_trainer: Callable[..., Any]
):
    config = staged(preset_file, tmp_path, "first", **{"training.offload": True})
    assert config.hash() == staged(preset_file, tmp_path, "first").hash()
    reward = training_reward(config, load_preset(config.model), META)
    trainer = make_trainer(config, tmp_path / "run", reward)
    stage.seen.clear()
    trainer.run()
    iterations = config.training.iterations
    assert stage.seen == [frozenset({"first"}), frozenset()] * iterations


def test_half_precision_is_for_gpus_and_not_for_a_reward_whose_gradient_is_trained_on(
    monkeypatch: pytest.MonkeyPatch, preset: Any
):
    asked = []
    monkeypatch.setattr("flowbench.evaluation.judges.build_reward", lambda *a, half, **b: asked.append(half))
    gpu = torch.device("cuda")
    for algorithm, device, overrides in (
        ("acflow", gpu, {}),
        ("acflow", CPU, {}),
        ("refl", gpu, {}),
        ("acflow", gpu, {"training.reward_precision": "float32"}),
    ):
        config = resolve_config(algorithm, "clip", "mini-sd3", overrides=overrides)
        training_reward(config, preset, device)
    assert asked == [True, False, False, False]


def test_an_evaluation_that_runs_out_of_memory_goes_on_in_halves_with_the_same_scores(
    shared_policy: Policy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    class Full(Reward):
        info = type("Info", (), {"name": "full", "truth": False})
        room = 99

        def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
            return fits(len(images), self.room) and images.mean((1, 2, 3))

    def fits(n: int, room: int) -> bool:
        if n > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return True

    rollout, decode, room = Policy.rollout, Policy.decode, {"rollout": 99, "decode": 99}
    monkeypatch.setattr(Policy, "rollout", lambda s, c, x, **a: fits(len(x), room["rollout"]) and rollout(s, c, x, **a))
    monkeypatch.setattr(Policy, "decode", lambda s, x: fits(len(x), room["decode"]) and decode(s, x))
    protocol = EvaluationConfig(prompts=4, images_per_prompt=2, num_steps=2)

    def scores() -> dict[str, Any]:
        test, full = load_split("shapes", "test"), Judges({"full": Full()}, oracle=True)
        return score_split(shared_policy, "current", test, full, protocol, lambda n: None).scores

    whole = scores()
    room |= {"rollout": 5, "decode": 3}
    Full.room = 2
    with caplog.at_level(logging.WARNING, "flowbench"):
        divided = scores()
    assert {message.split(" goes on")[0] for message in caplog.messages} == {
        f"out of memory: {what} in the evaluation" for what in ("sampling", "decoding", "scoring")
    }
    for name, values in whole.items():
        assert abs(divided[name] - values).max() < 1e-3, name


@pytest.mark.parametrize(
    ("resolution", "asked", "expected"), [(32, None, 64), (512, None, 8), (1024, None, 2), (512, 3, 3)]
)
def test_images_are_decoded_by_two_megapixels_at_a_time(
    resolution: int, asked: int | None, expected: int, shared_policy: Policy, monkeypatch: pytest.MonkeyPatch
):
    preset = shared_policy.preset.model_copy(update={"resolution": resolution})
    monkeypatch.setattr(shared_policy, "preset", preset)
    assert decode_batch(shared_policy, EvaluationConfig(decode_batch=asked)) == expected


def test_settings_that_only_divide_or_place_the_work_are_in_no_hash(preset_file: str, tmp_path: Path):
    plain = resolve_config("acflow", "jpeg", "mini-sd3", overrides={})
    placed = {"training.offload": True, "training.encode_first": True, "evaluation.decode_batch": 3}
    placed |= {"evaluation.batch": 5, "evaluation.base_cache": False}
    config = resolve_config("acflow", "jpeg", "mini-sd3", overrides=placed)
    assert config.hash() == plain.hash()
    splits = [load_split("shapes", "test")]
    assert protocol_hash(config.evaluation, splits) == protocol_hash(plain.evaluation, splits)
    half = resolve_config("acflow", "jpeg", "mini-sd3", overrides={"training.reward_precision": "float32"})
    assert half.hash() != plain.hash()
