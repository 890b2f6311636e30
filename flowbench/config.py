"""The frozen, validated configuration of a run; unknown keys and wrong types are errors that name the nearest key."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import UsageError, did_you_mean
from .presets import ModelPreset, load_preset
from .registry import algorithms, rewards


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainingConfig(_Section):
    """What the one loop does, whatever the algorithm."""

    images: int = Field(9600, ge=1, description="budget: images generated for training")
    prompts_per_iteration: int = Field(16, ge=1)
    images_per_prompt: int = Field(4, ge=1, description="group size")
    tuning: Literal["full", "lora"] = "full"
    lora_rank: int = Field(32, ge=1)
    lora_alpha: float = Field(64.0, gt=0)
    learning_rate: float = Field(1e-4, gt=0)
    auxiliary_learning_rate: float = Field(1e-3, gt=0, description="of an algorithm's own networks, such as a critic")
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: int = Field(1, ge=1, description="passes over each rollout")
    minibatch: int = Field(64, ge=1, description="rows per optimizer step")
    microbatch: int | None = Field(None, ge=1, description="rows per backward pass; None is the whole minibatch")
    decode_batch: int = Field(64, ge=1, description="images decoded and scored at a time")
    gradient_checkpointing: bool = False
    sampler: str = Field("ode", description="sampler of training rollouts")
    eta: float = Field(0.7, ge=0, description="noise level of a stochastic sampler")
    sigma_distribution: Literal["logit-normal", "uniform", "sampler"] = "logit-normal"
    sigma_logit: tuple[float, float] = Field((0.0, 1.0), description="mean and deviation of the logit-normal sigmas")
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of the average of the tuned weights that is evaluated; 0 is none"
    )
    checkpoint_every: int = Field(25, ge=1, description="iterations between checkpoints")


class EvaluationConfig(_Section):
    """The protocol: same prompts and same noise for base and tuned model. Its seed is not the training seed."""

    splits: tuple[str, ...] = ("test", "compositional")
    prompts: int = Field(96, ge=2, description="prompts per split, spread over the categories")
    images_per_prompt: int = Field(4, ge=2)
    num_steps: int | None = Field(None, ge=1, description="sampler steps; None is the model's own number")
    batch: int = Field(64, ge=1)
    seed: int = 20_251


class RunConfig(_Section):
    """All that decides what a run computes. `hyperparameters` is validated by the algorithm's own Config."""

    algorithm: str
    reward: str
    model: str = "mini-sd3"
    seed: int = Field(0, ge=0)
    device: str = "auto"
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    hyperparameters: dict[str, Any] = {}

    def hash(self) -> str:
        """Ten hex digits over everything but seed and device, the preset's content included."""
        content = self.model_dump(mode="json", exclude={"seed", "device"})
        # Its defaults for training are in the resolved settings already.
        resolved = {"training", "evaluation", "algorithms"}
        content["preset"] = load_preset(self.model).model_dump(mode="json", exclude=resolved)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


# How users spell the sections in `--set` and in configuration files.
SECTIONS = {"training": TrainingConfig, "evaluation": EvaluationConfig, "algorithm": None}


def resolve_config(
    algorithm: str, reward: str, model: str, *, overrides: dict[str, Any], seed: int = 0, device: str = "auto"
) -> RunConfig:
    """Defaults, then the model's, then the algorithm's for that model, then `overrides` ({"training.images": 100}).

    Raises UsageError for an unknown name or key, a wrong type or range, or needs that sampler or reward cannot meet.
    """
    preset = load_preset(model)
    plugin = algorithms.get(algorithm)
    reward_plugin = rewards.get(reward)
    mine = preset.algorithms.get(algorithm, {})
    training = {**preset.training, **_default_sampler(plugin.info.needs), **mine.get("training", {})}
    sections: dict[str, dict[str, Any]] = {
        "training": training,
        "evaluation": dict(preset.evaluation),
        "algorithm": dict(mine.get("algorithm", {})),
    }
    for key, value in overrides.items():
        section, dot, name = key.partition(".")
        if section not in sections or not dot:
            hint = did_you_mean(section, sections) if dot else f"; write section.key, with {', '.join(sections)}"
            raise UsageError(f"unknown setting '{key}'{hint}")
        sections[section][name] = value
    values = {
        "algorithm": algorithm,
        "reward": reward,
        "model": model,
        "seed": seed,
        "device": device,
        "training": _validate(TrainingConfig, "training", sections["training"]),
        "evaluation": _validate(EvaluationConfig, "evaluation", sections["evaluation"]),
        "hyperparameters": _validate(plugin.cls.Config, "algorithm", sections["algorithm"]).model_dump(mode="json"),
    }
    config: RunConfig = _validate(RunConfig, "", values)
    _check_needs(plugin.info.needs, config, reward_plugin.info.differentiable)
    return config


def _default_sampler(needs: frozenset[str]) -> dict[str, Any]:
    return {"sampler": "flow-sde"} if "log_prob" in needs else {}


def _check_needs(needs: frozenset[str], config: RunConfig, differentiable: bool) -> None:
    from .samplers import SAMPLERS_WITH_LOG_PROB, sampler_names

    sampler = config.training.sampler
    if sampler not in sampler_names():
        raise UsageError(f"unknown sampler '{sampler}'{did_you_mean(sampler, sampler_names())}")
    if "log_prob" in needs and sampler not in SAMPLERS_WITH_LOG_PROB:
        raise UsageError(f"{config.algorithm} needs log_prob; sampler '{sampler}' has none, use 'flow-sde'")
    if "reward_grad" in needs and not differentiable:
        raise UsageError(
            f"{config.algorithm} needs the reward's gradient; reward '{config.reward}' has none, use for example 'clip'"
        )


def _validate(model: type[BaseModel], section: str, values: dict[str, Any]) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        full = f"{section}.{name}".lstrip(".")
        if first["type"] == "extra_forbidden":
            raise UsageError(f"unknown setting '{full}'{did_you_mean(name, model.model_fields)}") from error
        raise UsageError(f"setting '{full}' = {first['input']!r}: {first['msg'].lower()}") from error


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """["training.images=100"] as {"training.images": 100}; values are read as YAML.

    Raises UsageError for text without '='.
    """
    values = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text!r} has no '='; write --set training.images=2000")
        values[key.strip()] = _number(yaml.safe_load(value))
    return values


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
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"configuration file '{path}' is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"configuration file '{path}' must hold key: value pairs")
    flat: dict[str, Any] = {}
    plain = {"reward", "model", "seed", "device"}
    for key, value in content.items():
        # A run's own config.yaml spells the algorithm's name `algorithm` and its settings `hyperparameters`.
        section = "algorithm" if key == "hyperparameters" else key
        if isinstance(value, dict) and section in SECTIONS:
            flat |= {f"{section}.{name}": _number(v) for name, v in value.items()}
        elif key in plain or key == "algorithm":
            flat[key] = value if key == "seed" or value is None else str(value)
        else:
            raise UsageError(f"unknown key '{key}' in '{path}'{did_you_mean(str(key), [*SECTIONS, *plain])}")
    return flat


def load_run_config(path: Path) -> tuple[RunConfig, ModelPreset]:
    """The configuration that a run folder was made with."""
    config = RunConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    return config, load_preset(config.model)
