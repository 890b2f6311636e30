from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flowbench.config import RunConfig
from flowbench.errors import RunError, UsageError
from flowbench.experiments.folder import run_folder
from flowbench.experiments.reevaluate import evaluate
from flowbench.experiments.run import Listener, execute, load_tuned
from flowbench.models.devices import pick_device
from flowbench.models.presets import load_preset
from flowbench.record import Record, load_record
from flowbench.training.state import load_state

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")

SLOW_REWARD = """
import os, time
from pathlib import Path
from flowbench.reward import Reward, register_reward

@register_reward("slow", source="tests", licence="none", range=(0.0, 1.0), differentiable=False)
class Slow(Reward):
    '''Mean brightness; at its third call it reports, and waits to be interrupted.'''

    calls = 0

    def score(self, images, prompts):
        self.calls += 1
        place = os.environ.get("FLOWBENCH_TEST_PLACE")
        if place and self.calls == 3:
            (Path(place) / "ready").touch()
            deadline = time.monotonic() + 60
            while not (Path(place) / "go").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        return images.mean((1, 2, 3))
"""


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: MakeConfig, pictures: Callable
) -> tuple[Path, Record, RunConfig]:
    """A run of AC-Flow on CLIP with 128 images, evaluated on two splits."""
    overrides = {
        "training.images": 128,
        "training.prompts_per_iteration": 8,
        "training.minibatch": 16,
        "training.ema": 0.5,
        "algorithm.warmup": 1,
        "evaluation.splits": ["test", "compositional"],
        "evaluation.prompts": 6,
    }
    config = tiny_config("acflow", "clip", seed=3, overrides=overrides)
    folder = run_folder(tmp_path_factory.mktemp("runs"), config)
    with pictures():
        return folder, execute(config, folder, "flowbench run acflow", resume=False), config


def test_a_run_folder_answers_what_produced_it(finished: tuple):
    folder, record, config = finished
    assert folder.parts[-4:] == ("tiny", "clip", "acflow", f"{config.hash()}-s3")
    expected = ["DONE", "checkpoints", "config.yaml", "curves.png", "metrics.jsonl", "record.json", "samples"]
    assert set(expected) <= {path.name for path in folder.iterdir()}
    assert {path.name for path in (folder / "samples").iterdir()} == {"test.png", "compositional.png"}
    assert not list(folder.rglob("*.tmp"))
    assert RunConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text())) == config
    assert record.config == config.model_dump(mode="json")
    assert record.config_hash == config.hash()
    assert record.seed == 3
    assert record.command == "flowbench run acflow"
    assert set(record.prompt_hashes) == {"train", "test", "compositional"}
    assert torch.__version__.startswith(record.versions["torch"])


def test_the_record_reads_back_as_it_was_written(finished: tuple):
    folder, record, _ = finished
    assert load_record(folder / "record.json") == record


def test_the_record_counts_what_was_spent(finished: tuple):
    folder, record, _ = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert record.budget.images == record.budget.reward_calls == lines[-1]["images"] == 128
    # four sampler steps; one policy and one reference evaluation per row in the three iterations after warm-up
    assert record.budget.function_evaluations == 128 * 4 + 2 * 96
    assert record.budget.seconds == pytest.approx(sum(line["seconds"] for line in lines))
    assert 0 <= record.budget.overhead < 0.5
    assert record.budget.peak_memory_mb > 50


def test_the_truth_of_the_images_trained_on_is_logged_now_and_then(finished: tuple):
    folder, _, _ = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    verdicts = [line["metrics"].get("oracle_exact") for line in lines]
    assert 0 <= verdicts[0] <= 1
    assert verdicts[1:] == [None] * 3


def test_a_run_on_the_truth_itself_logs_no_truth_beside_it(tiny_config: MakeConfig, tmp_path: Path):
    config = tiny_config("raft", "oracle", overrides={"evaluation.judges": []})
    execute(config, tmp_path / "run", "", resume=False)
    assert "oracle_exact" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_scores_are_the_means_of_the_per_prompt_values(finished: tuple):
    _, record, _ = finished
    measured = {"oracle_exact", "oracle_soft", "w2", "diversity", *load_preset("mini-sd3").rewards}
    assert {key.split("/")[0] for key in record.scores} == measured
    for key, values in record.per_prompt.items():
        score = record.scores[key]
        assert len(values["base"]) == len(values["tuned"]) == len(record.prompts[key.split("/")[1]]) == 6
        assert score.base == pytest.approx(sum(values["base"]) / 6, rel=1e-5)
        assert score.tuned == pytest.approx(sum(values["tuned"]) / 6, rel=1e-5)
        low, high = score.diff_ci95
        assert low - 1e-6 <= score.tuned - score.base <= high + 1e-6
    for split in ("test", "compositional"):
        assert record.scores[f"w2/{split}"].base == 0
        assert record.scores[f"w2/{split}"].tuned > 0


def test_reevaluation_reproduces_the_record_exactly(finished: tuple):
    folder, record, _ = finished
    again = evaluate(folder, {}, None, "cpu", lambda done, total: None)
    assert again.scores == record.scores


def test_reevaluation_takes_another_protocol_but_no_other_training(finished: tuple):
    folder, record, _ = finished
    seen = []
    settings = {"evaluation.splits": ["test"], "evaluation.prompts": 3, "evaluation.seed": 5}
    changed = evaluate(folder, settings, None, "cpu", lambda done, total: seen.append((done, total)))
    assert {key.split("/")[1] for key in changed.scores} == {"test"}
    assert changed.scores["clip/test"] != record.scores["clip/test"]
    assert seen[-1] == (12, 12)
    with pytest.raises(UsageError, match=r"cannot change 'training\.images' of a finished run"):
        evaluate(folder, {"training.images": 3}, None, "cpu", lambda done, total: None)


def test_the_weights_that_are_evaluated_are_saved_for_diffusers(finished: tuple):
    from diffusers import SD3Transformer2DModel

    folder, _, config = finished
    policy, loaded = load_tuned(folder, CPU)
    assert loaded == config
    saved = SD3Transformer2DModel.from_pretrained(folder / "checkpoints" / "tuned" / "transformer")
    average = load_state(folder / "checkpoints" / "last.safetensors")["average"]
    for a, b, c in zip(policy.trainable_parameters(), saved.parameters(), average, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_finished_run_is_not_overwritten(finished: tuple):
    folder, record, config = finished
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}
    with pytest.raises(UsageError, match=r"this run is finished: .*; change --seed or a setting"):
        execute(config, folder, "again", resume=False)
    assert execute(config, folder, "again", resume=True) == record
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")} == before


def test_a_run_that_does_not_exist_is_not_continued(tmp_path: Path, tiny_config: MakeConfig):
    with pytest.raises(UsageError, match=f"nothing to resume in {re.escape(str(tmp_path / 'run'))}; ") as raised:
        execute(tiny_config("orw-cfm-w2"), tmp_path / "run", "", resume=True)
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_unfinished_run_is_continued_only_on_request(tmp_path: Path, tiny_config: MakeConfig):
    config = tiny_config("orw-cfm-w2", overrides={"training.checkpoint_every": 1, "evaluation.judges": []})

    def fail(log: Any) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        execute(config, tmp_path, "", resume=False, listener=Listener(on_iteration=fail))
    with pytest.raises(UsageError, match=r"an unfinished run is in .*; add --resume to continue it"):
        execute(config, tmp_path, "", resume=False)
    started = []
    record = execute(config, tmp_path, "", True, Listener(on_start=lambda done, total: started.append((done, total))))
    assert started == [(1, 2)]
    assert record.budget.images == 32
    assert (tmp_path / "DONE").exists()


def test_a_run_that_was_interrupted_while_evaluating_only_evaluates_when_resumed(
    tmp_path: Path, tiny_config: MakeConfig
):
    config = tiny_config("orw-cfm-w2", overrides={"training.ema": 0.5, "evaluation.judges": ["oracle"]})

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(config, tmp_path / "parts", "", resume=False, listener=Listener(on_evaluation=interrupt))
    iterations = []
    resumed = execute(config, tmp_path / "parts", "", True, Listener(on_iteration=iterations.append))
    assert iterations == []
    assert resumed.scores == execute(config, tmp_path / "whole", "", resume=False).scores


def test_a_lora_run_leaves_weights_that_diffusers_loads(tmp_path: Path, tiny_config: MakeConfig, preset: Any):
    from flowbench.models.families import load_pipeline

    overrides = {"training.tuning": "lora", "training.lora_rank": 4, "training.images": 16, "evaluation.judges": []}
    config = tiny_config("orw-cfm-w2", overrides=overrides)
    record = execute(config, tmp_path, "", resume=False)
    assert record.scores["w2/test"].tuned > 0
    policy, _ = load_tuned(tmp_path, CPU)
    plain = load_pipeline(preset, CPU)
    plain.load_lora_weights(tmp_path / "checkpoints" / "tuned")
    x, sigma, cond = torch.randn(2, *policy.latent_shape), torch.tensor([0.3, 0.8]), policy.encode(["a", "b"])
    with torch.no_grad():
        v = plain.transformer(x, *cond.rows().values(), timestep=sigma * 1000, return_dict=False)[0]
        assert torch.allclose(v, policy.velocity(x, sigma, cond), atol=1e-5)
        assert not torch.allclose(v, policy.velocity(x, sigma, cond, "reference"), atol=1e-5)


def test_an_interrupted_process_continues_bit_for_bit(
    tmp_path: Path,
    preset_file: str,
    settings: Callable[..., list[str]],
    flowbench_process: Callable,
    flowbench_main: Callable[..., int],
    read_log: Callable,
):
    """Ctrl-C in a process of its own, continued and compared in this one."""
    plugin = tmp_path / "slow.py"
    plugin.write_text(SLOW_REWARD, encoding="utf-8")
    arguments = ["run", "orw-cfm-w2", "--reward", "slow", "--plugin", plugin, "--model", preset_file]
    arguments += [
        "--device",
        "cpu",
        "--images",
        "64",
        *settings(training__checkpoint_every=100, evaluation__judges=["oracle"]),
    ]

    process = flowbench_process(*arguments, "--output", tmp_path / "parts", FLOWBENCH_TEST_PLACE=str(tmp_path))
    deadline = time.monotonic() + 120
    while not (tmp_path / "ready").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(2)
    (tmp_path / "go").touch()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.startswith("flowbench: interrupted after iteration 3 of 4")
    assert len(errors.splitlines()) == 1

    assert flowbench_main(*arguments, "--output", tmp_path / "parts", "--resume") == 0
    assert flowbench_main(*arguments, "--output", tmp_path / "whole") == 0
    (parts,), (whole,) = (list((tmp_path / name).rglob("record.json")) for name in ("parts", "whole"))
    assert read_log(parts.parent) == read_log(whole.parent)
    a, b = (load_state(path.parent / "checkpoints" / "last.safetensors") for path in (parts, whole))
    assert a["iteration"] == b["iteration"] == 4
    for x, y in zip(a["policy"]["current"], b["policy"]["current"], strict=True):
        assert torch.equal(x, y)
    assert load_record(parts).per_prompt == load_record(whole).per_prompt


def test_a_folder_without_a_run_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match="is no run folder"):
        load_tuned(tmp_path, CPU)


def test_a_run_without_a_checkpoint_is_named(tmp_path: Path, tiny_config: MakeConfig):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config().model_dump(mode="json")), encoding="utf-8")
    with pytest.raises(RunError, match="has no checkpoint yet; continue it with --resume"):
        load_tuned(tmp_path, CPU)


def test_an_unknown_split_is_refused_before_anything_is_written(tmp_path: Path, tiny_config: MakeConfig):
    config = tiny_config(overrides={"evaluation.splits": ["tset"]})
    with pytest.raises(UsageError, match="has no split 'tset'; did you mean 'test'"):
        execute(config, tmp_path / "run", "", resume=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_an_unusable_device_is_named(name: str):
    with pytest.raises(UsageError, match=f"device '{name}' cannot be used"):
        pick_device(name)
