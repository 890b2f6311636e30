"""What only a GPU can show: `pytest -m gpu -n0`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.config import RunConfig
from flowbench.evaluation.judges import build_reward
from flowbench.experiments.run import Listener, build_algorithm, build_policy, execute
from flowbench.models.presets import load_preset
from flowbench.prompts import load_split
from flowbench.record import Record
from flowbench.training.trainer import IterationLog, Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]


@pytest.mark.parametrize("algorithm", ["acflow", "flow-grpo", "nft", "refl"])
def test_a_run_on_the_gpu_follows_the_same_run_on_the_cpu(
    tiny_config: Callable[..., RunConfig], read_log: Callable[..., Any], tmp_path: Path, algorithm: str
) -> None:
    """The same noise, prompts and minibatches: float32 on both differs by rounding, which few steps do not amplify."""
    extra = {"algorithm.warmup": 1} if algorithm == "acflow" else {}
    config = tiny_config(algorithm, "clip", overrides={"training.learning_rate": 1e-5, **extra})
    records: dict[str, Record] = {}
    for device in ("cpu", "cuda"):
        records[device] = execute(config.model_copy(update={"device": device}), tmp_path / device, "", resume=False)
    cpu, gpu = (read_log(tmp_path / device) for device in records)
    assert [line["reward"] for line in gpu] == pytest.approx([line["reward"] for line in cpu], abs=2e-3)
    for name in ("clip/test", "diversity/test"):
        assert records["cuda"].scores[name].base == pytest.approx(records["cpu"].scores[name].base, abs=2e-3)
    assert records["cuda"].config_hash == records["cpu"].config_hash
    assert 0 < records["cuda"].budget.peak_memory_mb < 4096


def test_a_full_gpu_is_one_line_with_the_remedy_and_exit_code_1(
    settings: Callable[..., list[str]],
    flowbench_main: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        code = flowbench_main("run", "acflow", "--device", "cuda", "--output", tmp_path, *settings())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("flowbench: out of GPU memory; lower training.")


def test_an_interrupted_run_continues_on_the_gpu(
    tiny_config: Callable[..., RunConfig], read_log: Callable[..., Any], tmp_path: Path
) -> None:
    overrides = {"algorithm.warmup": 0, "training.checkpoint_every": 1, "training.learning_rate": 1e-5}
    config = tiny_config("acflow", "clip", overrides=overrides).model_copy(update={"device": "cuda"})
    execute(config, tmp_path / "whole", "", resume=False)

    def interrupt(log: IterationLog) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(config, tmp_path / "parts", "", resume=False, listener=Listener(on_iteration=interrupt))
    execute(config, tmp_path / "parts", "", resume=True)
    whole, parts = (read_log(tmp_path / name) for name in ("whole", "parts"))
    assert [line["iteration"] for line in parts] == [1, 2]
    assert [line["reward"] for line in parts] == pytest.approx([line["reward"] for line in whole], abs=1e-4)


@pytest.fixture
def overlapping(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> Trainer:
    """A trainer on the GPU that samples 64 images by sixteens, and scores them by eights beside that."""
    sizes = {"training.images": 128, "training.images_per_prompt": 16, "training.num_steps": 20}
    parts = {"training.rollout_batch": 16, "training.decode_batch": 8}
    config = tiny_config("flow-grpo", "clip", overrides={**sizes, **parts}).model_copy(update={"device": "cuda"})
    preset, gpu = load_preset(config.model), torch.device("cuda")
    reward, prompts = build_reward(config.reward, preset, gpu), load_split(preset.prompts, "train").prompts
    policy = build_policy(config, preset, gpu)
    return Trainer(config, policy, build_algorithm(config, reward), reward, prompts, tmp_path)


def test_scored_beside_the_rollout_or_after_it_an_iteration_has_the_same_bits(overlapping: Trainer) -> None:
    collector = overlapping.collector
    assert collector.overlaps
    beside = collector.collect(0, overlapping.budget)
    collector.overlaps = False
    after = collector.collect(0, overlapping.budget)
    for name in ("x0", "images", "reward", "states", "log_prob"):
        assert torch.equal(getattr(beside, name).cpu(), getattr(after, name).cpu()), name


def test_decoding_runs_in_a_stream_of_its_own_while_the_next_images_are_sampled(
    overlapping: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, collector = overlapping.policy, overlapping.collector
    collector.collect(0, overlapping.budget)  # kernels are chosen and loaded
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event, int]]] = {"rollout": [], "decode": []}

    def timed(name: str) -> None:
        method = getattr(policy, name)

        def call(*arguments: Any, **options: Any) -> Any:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = method(*arguments, **options)
            end.record()
            spans[name].append((begin, end, torch.cuda.current_stream().cuda_stream))
            return result

        monkeypatch.setattr(policy, name, call)

    timed("rollout")
    timed("decode")
    base = torch.cuda.Event(enable_timing=True)
    base.record()
    collector.collect(1, overlapping.budget)
    torch.cuda.synchronize()
    assert {s for *_, s in spans["rollout"]}.isdisjoint(s for *_, s in spans["decode"])
    assert len({s for *_, s in spans["decode"]}) == 1
    sampled, decoded = (
        [(base.elapsed_time(begin), base.elapsed_time(end)) for begin, end, _ in spans[name]] for name in spans
    )
    assert any(a < d and c < b for a, b in sampled for c, d in decoded)
