"""What a search does not vary is published, or common to all methods of a kind: never one method's own by hand."""

from __future__ import annotations

from typing import Any

import pytest

from flowbench.algorithm import Defaults
from flowbench.config import RunConfig, resolve_config
from flowbench.registry import algorithms
from flowbench.toolkit.defaults import COMMON, OWN_NETWORKS, common_settings

# Settings that were found by hand for one method. In the plane, orw-cfm-w2's known answers rest on them.
BY_HAND: dict[tuple[str, str], set[str]] = {
    ("orw-cfm-w2", "gaussian"): {"training.epochs", "training.sigma_distribution"},
    ("orw-cfm-w2", "mixture"): {"training.epochs", "training.sigma_distribution"},
}

CASES = [(name, model) for name in algorithms.names() for model in COMMON]


def effective(config: RunConfig) -> dict[str, Any]:
    """All settings of a run by full names."""
    training = {f"training.{name}": value for name, value in config.training.model_dump(mode="json").items()}
    return training | {f"algorithm.{name}": value for name, value in config.hyperparameters.items()}


def not_in_common(name: str, model: str) -> set[str]:
    """Settings, of those that are not searched, that neither the kind has in common nor the paper published."""
    info = algorithms.describe(name)
    cls, reward = algorithms.get(name).cls, "clip" if model == "mini-sd3" else "linear"
    found = effective(resolve_config(name, reward, model, overrides={}))
    common = {key: value for key, value in common_settings(model, info.family).items() if key in found}
    brought: Defaults = cls.defaults.get(model, Defaults())
    published = {f"algorithm.{key}": value for key, value in cls.Config().model_dump(mode="json").items()}
    networks = {f"training.{key}": value for key, value in OWN_NETWORKS.items()}
    allowed = published | networks | common
    own = {f"training.{key}" for key in brought.training} | {f"algorithm.{key}" for key in brought.algorithm}
    keys = (own | set(common)) - set(cls.search_space)
    return {key for key in keys if key not in allowed or found[key] != allowed[key]}


@pytest.mark.parametrize(("name", "model"), CASES)
def test_a_setting_that_is_not_searched_is_published_or_common_to_the_kind(name: str, model: str):
    assert not_in_common(name, model) == BY_HAND.get((name, model), set())


def test_a_kind_chooses_only_what_no_method_of_it_searches():
    for name, model in CASES:
        common = common_settings(model, algorithms.describe(name).family)
        assert not set(common) & set(algorithms.get(name).cls.search_space)
