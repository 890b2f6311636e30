"""How people write settings: `--set` assignments and configuration files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowbench.config import SECTIONS, validated
from flowbench.errors import UsageError, did_you_mean, shortened
from flowbench.prompts import locate
from flowbench.reading.documents import DocumentError, parse_yaml, read_yaml
from flowbench.sections import TrainingConfig


def full_names(changed: Mapping[str, Any]) -> dict[str, Any]:
    """An ablation's settings, {"tau": 2.0, "training.ema": 0.0}, by full names: those without a section are the
    algorithm's own."""
    return {key if "." in key else f"algorithm.{key}": value for key, value in changed.items()}


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """["training.images=100"] as {"training.images": 100}; values are read as YAML.

    Raises UsageError for text without '=', without a key before it, or with what is no YAML behind it.
    """
    values = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            lacking = "key before its '='" if equals else "'='"
            raise UsageError(f"--set {shortened(text)} has no {lacking}; write --set training.images=2000")
        try:
            values[key.strip()] = _number(parse_yaml(value))
        except DocumentError as error:
            raise UsageError(
                f"--set {shortened(text)}: {shortened(value)} cannot be read as a value, it {error}; put text with "
                "special characters in quotes"
            ) from error
    return values


def with_budget(settings: Mapping[str, Any], images: int | None) -> dict[str, Any]:
    """The settings with `--images`, where it is given, in the place of what they say of it.

    Raises UsageError where that is no budget: it would be passed over.
    """
    if images is None:
        return dict(settings)
    validated(TrainingConfig, "training", {"images": settings.get("training.images", images)})
    return {**settings, "training.images": images}


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; users mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML file: nested sections as {"training.images": 100}, plus top-level names of RunConfig.

    Raises UsageError when it is missing, no YAML, or has an unknown top-level key.
    """
    if not path.is_file():
        raise UsageError(f"configuration file '{path}' does not exist")
    try:
        content = read_yaml(path) or {}
    except DocumentError as error:
        raise UsageError(f"configuration file '{path}' {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"configuration file '{path}' must hold key: value pairs")
    flat: dict[str, Any] = {}
    plain = {"reward", "model", "seed", "device", "prompts"}
    for key, value in content.items():
        # A run's own config.yaml spells the algorithm's name `algorithm` and its settings `hyperparameters`.
        section = "algorithm" if key == "hyperparameters" else key
        if isinstance(value, dict) and section in SECTIONS:
            flat |= {f"{section}.{name}": _number(v) for name, v in value.items()}
        elif key == "prompts_hash" or (key == "prompts" and value is None):
            continue  # a run's own: the hash is that of whatever the prompts are when they are read again
        elif key == "prompts":
            flat[key] = locate(str(value), path.parent)
        elif key in plain or key == "algorithm":
            flat[key] = value if key == "seed" or value is None else str(value)
        else:
            raise UsageError(f"unknown key '{key}' in '{path}'{did_you_mean(str(key), [*SECTIONS, *plain])}")
    return flat
