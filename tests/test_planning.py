"""What a run will cost, computed before it, is what it costs."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowbench.config import RunConfig, resolve_config
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.protocol import count_images
from flowbench.experiments.planning.counts import count
from flowbench.experiments.planning.needs import Needs, Slope
from flowbench.experiments.planning.phases import measure
from flowbench.experiments.planning.plan import (
    GIB,
    Division,
    configured,
    divided,
    fitted,
    parse_memory,
    phases_of,
    usable,
)
from flowbench.experiments.planning.repeats import skip_repeats
from flowbench.experiments.planning.storages import META, Meter, simulated
from flowbench.models.families.random_init import RandomText, blueprint, network, random_pipeline
from flowbench.models.policy import Policy
from flowbench.models.presets import load_preset
from flowbench.prompts import load_split
from flowbench.record import RANDOM, find_records
from flowbench.reporting.documents import to_csv
from flowbench.reporting.leaderboard import board
from flowbench.reward import Reward
from flowbench.scoring.checkpoints import random_weights
from flowbench.training.trainer import Trainer

ROOT = Path(__file__).parent.parent


# --- storages and operations ------------------------------------------------------------------------------------------


def test_a_storage_counts_from_the_operation_that_makes_it_to_its_end():
    with Meter(torch.device("cpu")) as meter:
        x = torch.zeros(1024)
        y = x[:512]  # a view takes nothing
        z = x + 1
        assert meter.live == 2 * 4096
        del x, y
        assert meter.live == 4096
        meter.start()
        z = z @ z
    assert meter.peak == 4096 + 512


def test_a_repeated_block_runs_once_without_gradient_and_counts_as_often_as_it_stands_there():
    class Block(torch.nn.Module):
        runs = 0

        def __init__(self, width: int) -> None:
            super().__init__()
            self.rise, self.fall = torch.nn.Linear(64, width), torch.nn.Linear(width, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Block.runs += 1
            return x + self.fall(torch.relu(self.rise(x)))

    def taken(remember: bool, grad: bool) -> tuple[int, int, int, int]:
        Block.runs = 0
        with Meter() as meter, META, torch.set_grad_enabled(grad):
            blocks = torch.nn.Sequential(*(Block(width) for width in (128, 128, 256, 256, 256)))
            x = torch.empty(8, 64)
            meter.start()
            if remember:
                skip_repeats(meter, [blocks])
            out = blocks(x)
            assert out.shape == x.shape
            return meter.peak, meter.live, meter.flops, Block.runs

    plain, remembered = taken(False, False), taken(True, False)
    assert remembered[:3] == plain[:3]
    assert plain[3] == 5
    assert remembered[3] == 2
    assert taken(True, True) == taken(False, True)


def test_products_of_matrices_are_counted_in_multiplications_and_additions():
    with Meter(torch.device("cpu")) as meter:
        torch.ones(3, 4) @ torch.ones(4, 5)
    assert meter.flops == 2 * 3 * 4 * 5


def test_content_that_nobody_knows_is_taken_for_rows_that_all_count():
    with simulated():
        weight = torch.empty(3, device=META)
        assert len(weight.nonzero()) == 3
        assert weight.sum().item() == 1.0
        assert weight.cpu().device.type == "cpu"


@pytest.fixture(scope="module")
def needs(preset_file: str) -> Needs:
    return measure(_config(preset_file, **{"evaluation.judges": ("aesthetic",)}))


def _config(model: str, algorithm: str = "nft", **overrides: object) -> RunConfig:
    return resolve_config(algorithm, "clip", model, overrides=dict(overrides), device="cpu")


def test_a_rollout_of_true_tensors_takes_the_memory_and_the_operations_that_were_computed(
    shared_policy: Policy, needs: Needs
):
    cond, noise = shared_policy.encode([f"{k}" for k in range(5)]), shared_policy.draw_noise(5)
    with Meter(torch.device("cpu")) as meter:
        meter.count_module(shared_policy.transformer)
        before = meter.live
        shared_policy.rollout(cond, noise, num_steps=1)
    assert meter.peak - before == pytest.approx(needs.step.at(5), rel=0.1)
    assert meter.flops == pytest.approx(5 * needs.step.flops)


def test_decoding_true_latents_takes_the_memory_and_the_operations_that_were_computed(
    shared_policy: Policy, needs: Needs
):
    x = shared_policy.draw_noise(5)
    with Meter(torch.device("cpu")) as meter, torch.no_grad():
        shared_policy.decode(x)
    assert meter.peak == pytest.approx(needs.decode.at(5), rel=0.1)
    assert meter.flops == pytest.approx(5 * needs.decode.flops)


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [("flow-grpo", {}), ("acflow", {"algorithm.w2_every": 4, "training.images_per_prompt": 8})],
)
def test_a_run_makes_the_images_and_function_evaluations_that_were_computed(
    algorithm: str,
    settings: dict[str, object],
    tiny_config: Callable[..., RunConfig],
    make_trainer: Callable[..., Trainer],
    clip: Reward,
    tmp_path: Path,
):
    config = tiny_config(algorithm, "clip", overrides={"evaluation.judges": (), **settings})
    trainer, computed, counts = make_trainer(config, tmp_path, clip), measure(config), count(config)
    trainer.run()
    made = counts.training.images * computed.rows
    assert trainer.budget.images == counts.training.images
    assert trainer.policy.function_evaluations == counts.training.total + made * sum(computed.evaluations.values())


def test_the_images_of_the_points_are_counted_with_the_base_models(tiny_config: Callable[..., RunConfig]):
    def on_dev(**settings: object) -> int | None:
        given = {f"evaluation.{name}": value for name, value in settings.items()}
        counts = count(tiny_config("raft", "jpeg", overrides=given))
        return counts.dev and counts.dev.images

    assert on_dev(points=0) is None
    assert on_dev(points=1) == 2 * 4 * 2  # base and point, four prompts, two images
    assert on_dev(points=5, dev_images_per_prompt=3) == 3 * 4 * 3  # no more points than the two iterations


def test_the_images_of_an_evaluation_are_counted_exactly(shared_policy: Policy, preset_file: str):
    config = _config(preset_file, **{"evaluation.prompts": 100})
    splits = [load_split("shapes", name) for name in config.evaluation.splits]
    assert count(config).evaluation_images == 2 * count_images(shared_policy, splits, config.evaluation)


# --- a limit ----------------------------------------------------------------------------------------------------------

LARGE = Needs(
    model=4 * GIB,
    gradients=GIB // 10,
    reward=4 * GIB,
    encoders={"clip": 2 * GIB, "t5": 9 * GIB},
    encode=Slope(0, GIB / 64),
    step=Slope(0, 0.045 * GIB, 1.0),
    free=1.0,
    states=0,
    decode=Slope(0, 0.375 * GIB, 1.0),
    score=Slope(0, 0.02 * GIB, 1.0),
    update=Slope(0, 0.2 * GIB, 1.0),
    evaluations={"current": 1.0},
    scored=0.0,
    rows=1.0,
    judges={"pickscore": (4 * GIB, Slope(0, 0.02 * GIB))},
    pixels=3 * 2**20,
    evaluation_decode=8,
)


def test_below_a_limit_every_phase_has_room_and_the_division_is_as_large_as_that_allows():
    config = resolve_config("nft", "clip", "sd3-medium", overrides={})
    room = usable(24 * GIB)
    assert room <= 22 * GIB
    division = fitted(config, LARGE, 24 * GIB)
    assert all(phase.peak <= room for phase in phases_of(config, LARGE, division))
    assert max(p.peak for p in phases_of(config, LARGE, configured(config, LARGE))) > room
    for field in ("rollout", "decode"):
        doubled = replace(division, **{field: 2 * getattr(division, field)})
        assert any(phase.peak > room for phase in phases_of(config, LARGE, doubled)), field


def test_rewards_leave_the_device_only_where_they_must():
    config = resolve_config("nft", "clip", "sd3-medium", overrides={})
    assert not fitted(config, LARGE, 24 * GIB).offload
    assert fitted(config, LARGE, 14 * GIB).offload


def test_decoding_and_scoring_beside_a_rollout_need_room_for_both_at_once():
    parts = {"training.rollout_batch": 64, "training.decode_batch": 32}
    config = resolve_config("nft", "clip", "sd3-medium", overrides=parts)
    both = configured(config, LARGE)
    assert both.overlap
    assert not configured(resolve_config("nft", "clip", "sd3-medium", overrides={}), LARGE).overlap  # in one part
    beside, turns = (
        {phase.name: phase for phase in phases_of(config, LARGE, division)}
        for division in (both, replace(both, overlap=False))
    )
    for name in ("decode", "score"):
        assert beside[name].peak == turns[name].peak + turns["rollout"].slice
        assert beside[name].detail == "32 images beside the rollout of 64"
    for name in turns.keys() - {"decode", "score"}:
        assert beside[name] == turns[name]


def test_a_limit_has_them_take_turns_unless_both_fit_beside_each_other():
    parts = {"training.rollout_batch": 128, "training.decode_batch": 32}
    config = resolve_config("nft", "clip", "sd3-medium", overrides=parts)
    asked = configured(config, LARGE)
    needed = max(phase.peak for phase in phases_of(config, LARGE, asked) if phase.name in ("decode", "score"))
    for room, expected in ((needed + GIB // 2, True), (needed - GIB // 2, False)):
        limit = int(room * 1.05 + GIB)
        division = fitted(config, LARGE, limit)
        assert (division.rollout, division.decode, division.offload) == (128, 32, False)
        assert division.overlap == divided(config, division).training.overlap == expected
        assert all(phase.peak <= usable(limit) for phase in phases_of(config, LARGE, division))
    refused = resolve_config("nft", "clip", "sd3-medium", overrides={**parts, "training.overlap": False})
    assert not fitted(refused, LARGE, 80 * GIB).overlap


def test_a_limit_that_no_division_keeps_is_one_line_that_names_the_phase():
    config = resolve_config("nft", "clip", "sd3-medium", overrides={})
    with pytest.raises(RunError, match=r"--memory-limit 9GiB .* phase 'encode'.*9\.\d GiB with 32 texts"):
        fitted(config, LARGE, 9 * GIB)


def test_a_divided_configuration_differs_in_what_divides_the_work_alone():
    config = _config("mini-sd3")
    other = divided(config, Division(8, 4, 2, 16, 8))
    assert other.evaluation.batch == 16
    assert (other.training.decode_batch, other.training.microbatch) == (4, 2)
    assert other.hyperparameters == config.hyperparameters
    assert other.training.minibatch == config.training.minibatch
    assert other.hash() == config.hash()


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * GIB), ("1.5 G", 1.5 * GIB), ("512MiB", GIB / 2)])
def test_memory_is_written_with_its_unit(text: str, size: float):
    assert parse_memory(text) == size


def test_memory_without_a_unit_is_refused():
    with pytest.raises(UsageError, match="write for example 24GiB"):
        parse_memory("24")


def test_the_command_prints_phases_and_cost_and_writes_them_as_json(
    flowbench_main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "plan.json"
    arguments = ["--dry-run", "--memory", "--memory-limit", "2GiB", "--tflops", "0.5", "--json", file]
    assert flowbench_main("run", "raft", "--set", "evaluation.judges=[]", *arguments) == 0
    output = capsys.readouterr().out
    content = json.loads(file.read_text())
    for word in ("rollout", "decode", "update", "evaluation tuned", "computed, not measured"):
        assert word in output
    assert content["peak"] == max(phase["peak"] for phase in content["phases"]) < usable(2 * GIB)
    assert flowbench_main("run", "raft", "--memory") == 2
    assert "--memory belongs to --dry-run" in capsys.readouterr().err


# --- random weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "billions"), [("sd3-medium", 2.03), ("sd3.5-medium", 2.24)])
def test_the_shipped_configurations_have_the_published_numbers_of_parameters(model: str, billions: float):
    parts = blueprint(load_preset(model)).parts
    made = {name: network(part, torch.bfloat16, lambda: META) for name, part in parts.items() if part.is_network}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in made.items()}
    assert sizes["transformer"] == pytest.approx(billions * 1e9, rel=0.01)
    assert sizes["text_encoder_3"] == pytest.approx(4.76e9, rel=0.01)
    assert sizes["text_encoder"] == pytest.approx(123.65e6, rel=0.01)
    assert sizes["text_encoder_2"] == pytest.approx(694.7e6, rel=0.01)


def test_a_text_without_encoders_is_random_numbers_of_the_right_shape_that_it_alone_decides():
    encode = RandomText(4096, 2048, torch.bfloat16)
    tokens, _, pooled, _ = encode(["a cat", "a dog"], max_sequence_length=128)
    again = encode("a dog", max_sequence_length=128)
    assert (tokens.shape, pooled.shape, tokens.dtype) == ((2, 205, 4096), (2, 2048), torch.bfloat16)
    assert torch.equal(again[0][0], tokens[1])
    assert not torch.equal(tokens[0], tokens[1])


def test_random_weights_are_the_same_in_every_process_and_leave_the_seed_alone():
    preset = load_preset("mini-sd3" + RANDOM)
    torch.manual_seed(5)
    first = random_pipeline(preset, torch.device("cpu"))
    drawn = torch.randn(1)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(1), drawn)
    second = random_pipeline(preset, torch.device("cpu"), "rest")
    assert second.text_encoder is None
    for a, b in zip(first.transformer.parameters(), second.transformer.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_real_reward_is_built_without_its_files():
    from flowbench.evaluation.judges import build_reward

    preset = load_preset("sd3-medium" + RANDOM)
    with random_weights(), META:
        for name in preset.rewards:
            assert build_reward(name, preset, META)


def test_a_model_with_random_weights_has_its_algorithms_own_defaults_and_another_hash():
    plain, random = _config("mini-sd3"), _config("mini-sd3" + RANDOM)
    assert random.training == plain.training
    assert random.hash() != plain.hash()


def test_a_formula_has_no_random_weights():
    with pytest.raises(UsageError, match="is a formula and has no weights"):
        load_preset("gaussian" + RANDOM)


def test_a_model_of_unknown_configuration_is_refused_in_one_line():
    preset = load_preset("sd3-medium").model_copy(update={"source": "somebody/something"})
    with pytest.raises(UsageError, match="--random-init has no configuration of model 'sd3-medium'"):
        blueprint(preset)


def test_no_record_of_random_weights_enters_a_table():
    record = find_records([ROOT / "leaderboard" / "history"])[0]
    random = record.model_copy(update={"model": record.model + RANDOM})
    assert to_csv(board([record, random])) == to_csv(board([record]))
    with pytest.raises(UsageError, match="no records found"):
        board([random])


# --- the script -------------------------------------------------------------------------------------------------------


def test_the_gpu_script_is_valid_shell():
    assert subprocess.run(["bash", "-n", ROOT / "scripts" / "gpu_check.sh"]).returncode == 0


@pytest.mark.slow
def test_the_gpu_script_runs_to_its_end_on_a_small_model(tmp_path: Path):
    import os
    import sys

    tiny = {"FLOWBENCH_CHECK_TINY": "1", "FLOWBENCH_CHECK_OUT": str(tmp_path), "PYTHON": sys.executable}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [ROOT / "scripts" / "gpu_check.sh", "mini-sd3"]
    done = subprocess.run(command, env={**os.environ, **tiny, **paths}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    (memory,) = tmp_path.glob("*-memory.json")
    row = json.loads(memory.read_text())["algorithms"]["raft"]
    assert row["computed_gib"] > 0
    assert row["measured_gib"] > 0
    (speeds,) = tmp_path.glob("*-mini-sd3.json")
    assert json.loads(speeds.read_text())["over_plain"] > 0
