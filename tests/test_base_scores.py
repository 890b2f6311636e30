"""The base model's scores are kept on disk, and used only where everything that decides them is the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.config import EvaluationConfig, RunConfig, resolve_config
from flowbench.evaluation import base_scores
from flowbench.evaluation.base_scores import BaseScores
from flowbench.evaluation.judges import build_reward
from flowbench.evaluation.pairs import evaluate_pairs
from flowbench.evaluation.protocol import Judges, score_split
from flowbench.experiments.run import execute
from flowbench.models.policy import Policy, Tuning
from flowbench.prompts import PromptSplit, load_split
from flowbench.record import Record
from flowbench.reward import Reward

CPU = torch.device("cpu")
TEST = load_split("shapes", "test")
PROTOCOL = EvaluationConfig(prompts=3, images_per_prompt=2, num_steps=2)
TIMES = {"budget", "finished", "command", "base_cached", "costs", "points"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "base-scores"


class Shade(Reward):
    info = type("Info", (), {"name": "shade", "truth": False})

    def __init__(self, sha256: str | None = "a") -> None:
        self.sha256 = sha256

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return images.mean((1, 2, 3))

    def provenance(self) -> dict[str, Any]:
        return {} if self.sha256 is None else {"sha256": self.sha256}


def judges(sha256: str | None = "a") -> Judges:
    return Judges({"shade": Shade(sha256)}, oracle=True, held_out=("shade",))


@pytest.fixture
def keep(shared_policy: Policy) -> None:
    """Scores of the base model, kept."""
    scores = score_split(shared_policy, "reference", TEST, judges(), PROTOCOL, lambda n: None)
    BaseScores(shared_policy, judges(), PROTOCOL).write(TEST, scores)


def read(policy: Policy, split: PromptSplit = TEST, by: Judges | None = None, **protocol: Any) -> Any:
    return BaseScores(policy, by or judges(), PROTOCOL.model_copy(update=protocol)).read(split)


def test_what_was_kept_is_read_back_to_the_last_bit_and_in_the_same_order(shared_policy: Policy, keep: None):
    scores = score_split(shared_policy, "reference", TEST, judges(), PROTOCOL, lambda n: None)
    kept = read(shared_policy)
    assert kept.prompts == scores.prompts
    assert [*kept.scores] == [*scores.scores]
    assert all((kept.scores[name] == scores.scores[name]).all() for name in scores.scores)
    assert torch.equal(kept.grid, scores.grid)


def with_preset(policy: Policy, **changed: Any) -> Policy:
    return Policy(policy.pipeline, policy.preset.model_copy(update=changed))


def test_another_preset_protocol_split_or_judge_is_not_the_same(
    shared_policy: Policy, keep: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    policy = shared_policy
    assert read(policy) is not None
    assert read(with_preset(policy, num_steps=9)) is None
    assert read(with_preset(policy, guidance_scale=1.5)) is None
    assert read(with_preset(policy, sigma_spacing="pipeline")) is None
    assert read(policy, base_cache=False) is None
    assert read(policy, seed=1) is None
    assert read(policy, num_steps=3) is None
    assert read(policy, batch=2) is None
    assert read(policy, prompts=4) is None
    assert read(policy, PromptSplit("test", TEST.prompts, "0" * 64)) is None
    assert read(policy, load_split("shapes", "compositional")) is None
    assert read(policy, by=judges("b")) is None
    assert read(policy, by=Judges({}, oracle=True)) is None
    assert read(policy, by=Judges(judges().rewards, oracle=False)) is None
    monkeypatch.setattr(base_scores, "code_hash", lambda: "of other code")
    assert read(policy) is None


def test_another_models_files_device_tuning_or_version_are_not_the_same(
    shared_policy: Policy, keep: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    source = shutil.copytree(shared_policy.preset.resolve_source(), tmp_path / "copy")
    assert read(with_preset(shared_policy, source=str(source))) is not None  # equal to the last time of change
    (source / "vae" / "diffusion_pytorch_model.safetensors").touch()
    assert read(with_preset(shared_policy, source=str(source))) is None
    monkeypatch.setattr(shared_policy, "tuning", Tuning("lora"))
    assert read(shared_policy) is None
    monkeypatch.undo()
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    assert read(shared_policy) is not None
    with monkeypatch.context() as patch:
        patch.setattr(base_scores, "device_identity", lambda device: "another device")
        assert read(shared_policy) is None
    monkeypatch.setattr(base_scores, "package_versions", lambda: {"torch": "3"})
    assert read(shared_policy) is None


def test_a_judge_that_does_not_say_what_its_scores_depend_on_is_never_cached(shared_policy: Policy, folder: Path):
    scores = score_split(shared_policy, "reference", TEST, judges(None), PROTOCOL, lambda n: None)
    BaseScores(shared_policy, judges(None), PROTOCOL).write(TEST, scores)
    assert not folder.exists()
    jpeg = Judges({"jpeg": build_reward("jpeg", shared_policy.preset, CPU)}, oracle=False)
    BaseScores(shared_policy, jpeg, PROTOCOL).write(TEST, scores)  # its code is all there is to it
    assert len([*folder.iterdir()]) == 1


def test_a_file_that_holds_other_scores_than_its_name_says_is_not_used(shared_policy: Policy, keep: None, folder: Path):
    (file,) = folder.iterdir()
    scores = score_split(shared_policy, "reference", TEST, judges("b"), PROTOCOL, lambda n: None)
    BaseScores(shared_policy, judges("b"), PROTOCOL).write(TEST, scores)
    (other,) = {*folder.iterdir()} - {file}
    file.write_bytes(other.read_bytes())
    assert read(shared_policy) is None
    assert read(shared_policy, by=judges("b")) is not None


def test_scores_that_were_made_in_smaller_portions_are_not_kept(
    shared_policy: Policy, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    decode, failed = Policy.decode, []

    def full(self: Policy, latents: torch.Tensor) -> torch.Tensor:
        if len(latents) > 3:
            failed.append(len(latents))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, latents)

    monkeypatch.setattr(Policy, "decode", full)
    pairs = evaluate_pairs(shared_policy, [TEST], judges(), PROTOCOL, lambda done, total: None)
    assert failed == [6]
    assert not pairs["test"].cached
    assert not folder.exists()


@pytest.fixture
def config(preset_file: str) -> Callable[..., RunConfig]:
    def make(**overrides: Any) -> RunConfig:
        settings = {"training.images": 8, "training.prompts_per_iteration": 2, "evaluation.prompts": 2}
        settings |= {"evaluation.points": 1, "evaluation.images_per_prompt": 2, "evaluation.judges": ["clip", "oracle"]}
        settings |= {name.replace("__", "."): value for name, value in overrides.items()}
        return resolve_config("orw-cfm-w2", "jpeg", preset_file, overrides=settings, device="cpu")

    return make


def test_a_run_with_kept_scores_has_the_same_record_and_says_so(
    config: Callable[..., RunConfig], tmp_path: Path, pictures: Callable
):
    def run(name: str) -> Record:
        with pictures():
            return execute(config(), tmp_path / name, "", resume=False)

    first, second = run("first"), run("second")
    assert (first.base_cached, second.base_cached) == ((), ("test", "compositional"))
    assert second.model_dump(exclude=TIMES) == first.model_dump(exclude=TIMES)
    assert first.dev_base
    assert [p.scores for p in second.points] == [p.scores for p in first.points]
    grids = [(tmp_path / name / "samples" / "test.png").read_bytes() for name in ("first", "second")]
    assert grids[0] == grids[1]
