from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from flowbench.config import RunConfig, load_run_config, resolve_config
from flowbench.errors import UsageError
from flowbench.models.presets import AnalyticPreset, load_preset, preset_names
from flowbench.registry import algorithms
from flowbench.settings import parse_assignments, read_config_file

MakeConfig = Callable[..., RunConfig]
SHIPPED = Path(__file__).parents[1] / "leaderboard/history/mini-sd3/clip/online-dpo-s0.json"


def resolve(algorithm: str = "acflow", reward: str = "jpeg", **overrides: object) -> RunConfig:
    return resolve_config(
        algorithm, reward, "mini-sd3", overrides={k.replace("__", "."): v for k, v in overrides.items()}
    )


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("training.lerning_rate", "unknown setting 'training.lerning_rate'; did you mean 'learning_rate'"),
        ("evaluation.promts", "unknown setting 'evaluation.promts'; did you mean 'prompts'"),
        ("algorithm.warmpu", "unknown setting 'algorithm.warmpu'; did you mean 'warmup'"),
        ("trainin.images", "unknown setting 'trainin.images'; did you mean 'training'"),
        ("images", "unknown setting 'images'; write section.key, with training, evaluation, algorithm"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key: str, complaint: str):
    with pytest.raises(UsageError, match=complaint):
        resolve(**{key: 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.images", "many"),
        ("training.images", 0),
        ("training.images", 1.5),
        ("training.learning_rate", -1e-4),
        ("training.tuning", "qlora"),
        ("training.ema", 1.0),
        ("training.adam_betas", [0.9]),
        ("evaluation.images_per_prompt", 1),
        ("evaluation.splits", 3),
        ("algorithm.tau", 0),
        ("algorithm.weight", "cubic"),
        ("algorithm.clip", "none"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(key: str, value: object):
    with pytest.raises(UsageError, match=f"setting '{key}.*' = ") as raised:
        resolve(**{key: value})
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("seed", [-1, "first", 1.5])
def test_a_wrong_seed_is_named(seed: object):
    with pytest.raises(UsageError, match="setting 'seed' = "):
        resolve_config("acflow", "jpeg", "mini-sd3", overrides={}, seed=seed)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UsageError, match="unknown algorithm 'acflw'; did you mean 'acflow'"):
        resolve("acflw")
    with pytest.raises(UsageError, match="unknown reward 'cilp'; did you mean 'clip'"):
        resolve(reward="cilp")
    with pytest.raises(UsageError, match="unknown model 'mini-sd'; did you mean 'mini-sd3'"):
        resolve_config("acflow", "jpeg", "mini-sd", overrides={})
    with pytest.raises(UsageError, match="unknown sampler 'flow-sd'; did you mean 'flow-sde'"):
        resolve(training__sampler="flow-sd")


def test_an_algorithm_that_needs_log_prob_refuses_a_sampler_without():
    with pytest.raises(UsageError, match="ddpo needs log_prob; sampler 'ode' has none, use 'flow-sde'"):
        resolve("ddpo", training__sampler="ode")


def test_an_algorithm_that_needs_log_prob_gets_a_stochastic_sampler_by_default():
    assert resolve("ddpo").training.sampler == "flow-sde"
    assert resolve("ddpo", training__sampler="cps").training.sampler == "cps"


def test_an_algorithm_that_needs_a_gradient_refuses_a_reward_without():
    with pytest.raises(UsageError, match="refl needs the reward's gradient; reward 'jpeg' has none"):
        resolve("refl")
    assert resolve("refl", "clip").reward == "clip"


def test_a_window_of_stochastic_steps_needs_a_stochastic_sampler_and_more_steps_than_it_has():
    with pytest.raises(UsageError, match=r"training\.sde_window: sampler 'ode' is not stochastic, use 'flow-sde'"):
        resolve(training__sde_window=2)
    with pytest.raises(UsageError, match=r"training\.sde_window is 8; it must be below the 8 sampler steps"):
        resolve("ddpo", training__sde_window=8)
    with pytest.raises(UsageError, match="must be below the 4 sampler steps"):
        resolve("ddpo", training__sde_window=5, training__num_steps=4)
    assert resolve("ddpo", training__sde_window=7).training.sde_window == 7


def test_an_option_that_came_later_leaves_older_hashes_as_they_were(scheduler_grid: None):
    shipped = json.loads(SHIPPED.read_text(encoding="utf-8"))
    was = {
        "training.minibatch": 32,
        "training.lora_rank": 32,
        "training.lora_alpha": 64.0,
        "training.reward_scale": "raw",
    }
    config = resolve_config("online-dpo", "clip", "mini-sd3", overrides=was)
    assert not {"anchor_decay", "shared_noise"} & set(shipped["config"]["training"])
    assert config.hash() == shipped["config_hash"]
    config = resolve("acflow", algorithm__w2_every=1)
    older = {name: value for name, value in config.hyperparameters.items() if name not in ("log_preview", "w2_every")}
    assert config.model_copy(update={"hyperparameters": older}).hash() == config.hash()
    for changed in ({"algorithm__w2_every": 2}, {"training__anchor_decay": 0.9}, {"training__shared_noise": False}):
        assert resolve("acflow", **changed).hash() != resolve("acflow").hash()


def test_overrides_win_over_the_models_defaults(tmp_path: Path):
    content = load_preset("mini-sd3").model_dump() | {"name": "mine"}
    content["training"] = {"images": 448, "minibatch": 7}
    content["algorithms"] = {"acflow": {"training": {"minibatch": 9}, "algorithm": {"tau": 3.0, "alpha": 0.25}}}
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    config = resolve_config("acflow", "jpeg", str(path), overrides={"algorithm.tau": 4.0})
    assert (config.training.images, config.training.minibatch) == (448, 9)
    assert (config.hyperparameters["tau"], config.hyperparameters["alpha"]) == (4.0, 0.25)


def test_a_configuration_is_frozen():
    with pytest.raises(ValidationError):
        resolve().seed = 3


def test_the_hash_ignores_seed_and_device_and_nothing_else(tiny_config: MakeConfig):
    config = tiny_config()
    assert config.hash() == tiny_config(seed=5).hash() == config.model_copy(update={"device": "cuda"}).hash()
    others = [
        tiny_config(reward="oracle"),
        tiny_config(algorithm="orw-cfm-w2"),
        tiny_config(overrides={"training.images": 48}),
        tiny_config(overrides={"evaluation.seed": 1}),
        tiny_config(overrides={"algorithm.tau": 0.123}),
    ]
    assert len({config.hash(), *(o.hash() for o in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.microbatch", 3),
        ("training.decode_batch", 3),
        ("training.rollout_batch", 3),
        ("training.overlap", False),
        ("training.gradient_checkpointing", True),
        ("evaluation.batch", 3),
    ],
)
def test_what_only_divides_the_work_is_in_no_hash(key: str, value: object):
    assert resolve(**{key: value}).hash() == resolve().hash()
    assert resolve(**{key: value}).undivided() == resolve().undivided() == resolve()


def test_the_hash_has_the_division_of_the_models_own_preset():
    plain = resolve_config("acflow", "clip", "sd3-medium", overrides={})
    other = resolve_config(
        "acflow", "clip", "sd3-medium", overrides={"training.microbatch": 2, "training.gradient_checkpointing": False}
    )
    assert (plain.training.microbatch, plain.training.gradient_checkpointing) == (8, True)
    assert plain.hash() == other.hash() == "24d835a3d0"
    assert other.undivided().training == plain.training


def test_assignments_are_read_as_yaml():
    given = ["a.b=3", "a.c=1e-4", "a.d=null", "a.e=[test]", "a.f=text", "a.g=x=y", "a.h=true"]
    expected = {"a.b": 3, "a.c": 1e-4, "a.d": None, "a.e": ["test"], "a.f": "text", "a.g": "x=y", "a.h": True}
    assert parse_assignments(given) == expected


def test_an_assignment_without_equals_sign_is_refused():
    with pytest.raises(UsageError, match=r"'training\.images' has no '='"):
        parse_assignments(["training.images"])


@pytest.mark.parametrize("algorithm", ["acflow", "ddpo", "orw-cfm-w2"])
def test_a_runs_own_configuration_file_resolves_to_the_same_configuration(
    tmp_path: Path, tiny_config: MakeConfig, algorithm: str
):
    changed = {"training.adam_betas": [0.8, 0.95], "training.microbatch": 3, "evaluation.num_steps": 6}
    if algorithm == "acflow":
        changed |= {"algorithm.clip": None, "algorithm.weight": "softplus"}
    config = tiny_config(algorithm, seed=3, overrides=changed)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    assert load_run_config(path)[0] == config

    given = read_config_file(path)
    plain = {name: given.pop(name) for name in ("algorithm", "reward", "model", "seed", "device")}
    again = resolve_config(**plain, overrides=given)
    assert again == config
    assert again.hash() == config.hash()


def test_a_configuration_file_may_be_partial_and_nested(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("reward: jpeg\ntraining: {images: 64, learning_rate: 1e-4}\nalgorithm: {tau: 2}\n")
    expected = {"reward": "jpeg", "training.images": 64, "training.learning_rate": 1e-4, "algorithm.tau": 2}
    assert read_config_file(path) == expected


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("trainig: {images: 3}", "unknown key 'trainig' .*; did you mean 'training'"),
        ("training: [1, 2]", "unknown key 'training'"),
        ("- a\n- b", "must hold key: value pairs"),
        ("a: [", "is not YAML"),
        ("\x00", "is not YAML"),
    ],
)
def test_a_faulty_configuration_file_is_refused_in_one_line(tmp_path: Path, content: str, complaint: str):
    path = tmp_path / "faulty.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=complaint) as raised:
        read_config_file(path)
    assert len(str(raised.value).splitlines()) == 1


def test_a_missing_configuration_file_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"absent\.yaml' does not exist"):
        read_config_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_resolves_with_every_built_in_algorithm(name: str):
    for algorithm in algorithms.names():
        reward = "linear" if isinstance(load_preset(name), AnalyticPreset) else "clip"
        assert resolve_config(algorithm, reward, name, overrides={}).model == name


def test_a_file_that_is_no_preset_is_refused(tmp_path: Path):
    path = tmp_path / "odd.yaml"
    path.write_text("reward: jpeg\n", encoding="utf-8")
    with pytest.raises(UsageError, match="is not a preset"):
        load_preset(str(path))
