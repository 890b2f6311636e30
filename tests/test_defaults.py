"""An algorithm brings its own defaults per model, and its search space."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from pydantic import Field

from flowbench.algorithm import (
    COMMON_SEARCH_SPACE,
    Algorithm,
    AlgorithmConfig,
    Choice,
    Defaults,
    Dimension,
    Integers,
    LogUniform,
    Uniform,
    register_algorithm,
)
from flowbench.config import RunConfig, resolve_config
from flowbench.conformance.declarations import declaration_fault
from flowbench.errors import UsageError
from flowbench.models.presets import AnalyticPreset, load_preset, preset_names
from flowbench.registry import algorithms

DECLARED = [(name, model) for name in algorithms.names() for model in algorithms.get(name).cls.defaults]


def model_file(folder: Path, **changed: Any) -> str:
    """A user's copy of mini-sd3's preset with these fields."""
    content = load_preset("mini-sd3").model_dump() | {"name": "mine"} | changed
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def resolve(algorithm: str, model: str, reward: str | None = None, **overrides: Any) -> RunConfig:
    reward = reward or ("linear" if isinstance(load_preset(model), AnalyticPreset) else "clip")
    return resolve_config(algorithm, reward, model, overrides={k.replace("__", "."): v for k, v in overrides.items()})


def fault(**attributes: Any) -> str | None:
    """What is wrong with an algorithm that declares these."""

    class Declaring(Algorithm["Declaring.Config"]):
        class Config(AlgorithmConfig):
            tau: float = Field(1.0, gt=0, le=10, description="temperature")

        defaults: ClassVar = attributes.get("defaults", {})
        search_space: ClassVar = attributes.get("search_space", {})

    return declaration_fault(Declaring)


# --- what the built-in ones declare -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", algorithms.names())
def test_every_default_and_every_end_of_a_search_dimension_is_accepted(name: str):
    assert declaration_fault(algorithms.get(name).cls) is None


@pytest.mark.parametrize(("name", "model"), DECLARED)
def test_an_algorithms_defaults_for_a_model_are_in_force(name: str, model: str):
    expected = algorithms.get(name).cls.defaults[model]
    assert model in preset_names()
    config = resolve(name, model)
    training = config.training.model_dump(mode="json")
    assert {key: training[key] for key in expected.training} == dict(expected.training)
    assert {key: config.hyperparameters[key] for key in expected.algorithm} == dict(expected.algorithm)


@pytest.mark.parametrize(("name", "model"), DECLARED)
def test_no_setting_depends_on_the_rewards_name(name: str, model: str):
    plane = isinstance(load_preset(model), AnalyticPreset)
    first, second = (resolve(name, model, r) for r in (("linear", "quadratic") if plane else ("clip", "aesthetic")))
    assert (first.training, first.hyperparameters) == (second.training, second.hyperparameters)


@pytest.mark.parametrize(("name", "model"), DECLARED)
def test_defaults_name_a_search_that_can_be_read(name: str, model: str):
    log = algorithms.get(name).cls.defaults[model].log
    assert log is None or (Path(__file__).parent.parent / log).exists()


def test_a_preset_with_settings_by_reward_is_refused(tmp_path: Path):
    path = model_file(tmp_path, algorithms={"nft": {"rewards": {"clip": {"training": {"minibatch": 16}}}}})
    with pytest.raises(UsageError, match="settings of nft under 'rewards'; use training and algorithm"):
        load_preset(path)


@pytest.mark.parametrize("name", algorithms.names())
def test_a_run_on_the_embedded_model_may_take_every_end_of_a_search_dimension(name: str):
    space = algorithms.get(name).cls.search_space
    for k in range(max(len(dimension.ends) for dimension in space.values())):
        ends = {key: dimension.ends[k % len(dimension.ends)] for key, dimension in space.items()}
        assert resolve_config(name, "clip", "mini-sd3", overrides=ends).training.ema == ends["training.ema"]


@pytest.mark.parametrize("name", algorithms.names())
def test_search_spaces_share_the_common_dimensions_and_have_few_of_their_own(name: str):
    space = algorithms.get(name).cls.search_space
    assert {key: space[key] for key in COMMON_SEARCH_SPACE} == COMMON_SEARCH_SPACE
    own = set(space) - set(COMMON_SEARCH_SPACE)
    assert 1 <= len(own) <= 3
    assert all(key.startswith("algorithm.") for key in own)


@pytest.mark.parametrize("name", algorithms.names())
def test_an_own_range_reaches_a_factor_of_ten_from_the_published_value_and_no_further(name: str):
    cls = algorithms.get(name).cls
    for key, dimension in cls.search_space.items():
        if isinstance(dimension, LogUniform):
            assert dimension.high / dimension.low <= 100 * (1 + 1e-9), key
            if key.startswith("algorithm."):
                assert dimension.low < getattr(cls.Config(), key.removeprefix("algorithm.")) < dimension.high, key


# --- whose defaults a model gets --------------------------------------------------------------------------------------


def test_a_model_of_another_name_gets_no_defaults_of_the_algorithm(tmp_path: Path):
    path = model_file(tmp_path)
    assert load_preset(path).like is None
    config = resolve("nft", path)
    assert config.hyperparameters == algorithms.get("nft").cls.Config().model_dump(mode="json")
    assert config.training.learning_rate != resolve("nft", "mini-sd3").training.learning_rate


def test_a_model_like_another_gets_the_algorithms_defaults_for_that_one(tmp_path: Path):
    like, known = resolve("nft", model_file(tmp_path, like="mini-sd3")), resolve("nft", "mini-sd3")
    assert (like.training, like.hyperparameters) == (known.training, known.hyperparameters)


def test_whom_a_model_is_like_changes_no_hash(tmp_path: Path):
    alone = resolve("nft", model_file(tmp_path)).model_dump()
    hashes = []
    for like in (None, "mini-sd3", "gaussian"):
        model_file(tmp_path, like=like)  # the same file
        hashes.append(RunConfig.model_validate(alone).hash())
    assert len(set(hashes)) == 1


def test_a_model_like_an_unknown_one_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"mine\.yaml' is like 'mini-sd', .* did you mean 'mini-sd3'"):
        load_preset(model_file(tmp_path, like="mini-sd"))


def test_a_models_own_name_comes_before_whom_it_is_like(clean_registry: None, tmp_path: Path):
    @register_algorithm("knows-mine", paper="none", needs={"endpoint"})
    class KnowsMine(Algorithm[AlgorithmConfig]):
        """Knows a user's model."""

        defaults: ClassVar = {"mine": Defaults({"minibatch": 7}), "mini-sd3": Defaults({"minibatch": 9})}

    assert resolve("knows-mine", model_file(tmp_path, like="mini-sd3")).training.minibatch == 7
    assert resolve("knows-mine", "mini-sd3").training.minibatch == 9


def test_each_layer_wins_over_those_before_it(tmp_path: Path):
    overrides = {"nft": {"training": {"minibatch": 16}, "algorithm": {"kl": 0.25}}}
    training = {"learning_rate": 1e-5, "minibatch": 8, "ema": 0.5}
    path = model_file(tmp_path, like="mini-sd3", training=training, algorithms=overrides)
    config = resolve("nft", path, algorithm__beta=2.0)
    assert config.training.ema == 0.5  # the model's
    assert config.training.learning_rate == 2e-4  # the algorithm's
    assert config.training.minibatch == 16  # the preset's for the algorithm
    assert (config.hyperparameters["kl"], config.hyperparameters["states_per_image"]) == (0.25, 4)
    assert config.hyperparameters["beta"] == 2.0  # the user's
    assert resolve("nft", path, training__minibatch=4).training.minibatch == 4


def test_wrong_defaults_are_laid_at_the_algorithms_door(clean_registry: None):
    @register_algorithm("misspelt", paper="none", needs={"endpoint"})
    class Misspelt(Algorithm[AlgorithmConfig]):
        """Misspells a setting."""

        defaults: ClassVar = {"mini-sd3": Defaults({"minibach": 7})}

    complaint = "misspelt's own defaults for model 'mini-sd3' are wrong: unknown setting 'training.minibach'"
    with pytest.raises(UsageError, match=f"{complaint}; did you mean 'minibatch'"):
        resolve("misspelt", "mini-sd3")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "complaint"),
    [
        (
            {"defaults": {"m": Defaults({"minibach": 7})}},
            "its defaults for m are refused: unknown setting 'training.min",
        ),
        ({"defaults": {"m": Defaults({}, {"tau": 0})}}, "its defaults for m are refused: setting 'algorithm.tau' = 0"),
        ({"defaults": {"m": {"tau": 1}}}, r"its defaults for m are a dict; write Defaults\("),
        ({"search_space": {"algorithm.tua": Uniform(1, 2)}}, "'algorithm.tua' reaches 1, .*; did you mean 'tau'"),
        ({"search_space": {"algorithm.tau": Uniform(1, 20)}}, "'algorithm.tau' reaches 20, which is refused"),
        ({"search_space": {"training.ema": Choice((0.5, 1.0))}}, "'training.ema' reaches 1.0, which is refused"),
        ({"search_space": {"training.epochs": Uniform(1.5, 2.0)}}, "'training.epochs' reaches 1.5, which is refused"),
        ({"search_space": {"tau": Uniform(1, 2)}}, "'tau' is no setting; write training.NAME or algorithm.NAME"),
        ({"search_space": {"evaluation.seed": Integers(1, 2)}}, "'evaluation.seed' is no setting"),
        ({"search_space": {"algorithm.tau": (1, 2)}}, r"'algorithm.tau' is a tuple; write LogUniform\("),
        (
            {"search_space": {f"algorithm.{letter}": Uniform(1, 2) for letter in "abcdefg"}},
            "its search space has 7 dimensions; 6 are the most",
        ),
    ],
)
def test_a_wrong_declaration_is_a_finding_that_names_it(attributes: dict[str, Any], complaint: str):
    found = fault(**attributes)
    assert found is not None
    assert re.search(complaint, found)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Uniform(2, 2), "goes from 2 to 2; its low must be below its high"),
        (lambda: LogUniform(3, 2), "goes from 3 to 2"),
        (lambda: LogUniform(0, 2), "begins at 0; its low must be above 0"),
        (lambda: Integers(2, 1), "goes from 2 to 1"),
        (lambda: Choice((1,)), "give two or more different values"),
        (lambda: Choice((1, 1)), "give two or more different values"),
        (
            lambda: Choice(((0.5, 1.0), (0.8, 0.3))),
            "a Choice search dimension has .*; its values must be text, numbers",
        ),
    ],
)
def test_a_dimension_without_an_inside_is_refused(make: Any, complaint: str):
    with pytest.raises(UsageError, match=complaint):
        make()


# --- where a value stands in a dimension ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimension", "values"),
    [
        (Uniform(-1.0, 3.0), [-1.0, 0.0, 1.0, 2.0, 3.0]),
        (LogUniform(0.01, 100.0), [0.01, 0.1, 1.0, 10.0, 100.0]),
        (Integers(3, 7), [3, 4, 5, 6, 7]),
        (Choice(("a", None, 0.5, "b", True)), ["a", None, 0.5, "b", True]),
    ],
)
def test_a_dimension_places_its_quartiles_at_quarters(dimension: Dimension, values: list[Any]):
    assert [dimension.place(value) for value in values] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert (dimension.ends[0], dimension.ends[-1]) == (values[0], values[-1])
