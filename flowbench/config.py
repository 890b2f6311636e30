"""The frozen, validated configuration of a run; unknown keys and wrong types are errors that name the nearest key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from flowbench.errors import UsageError, did_you_mean, shortened
from flowbench.models.presets import AnalyticPreset, ModelPreset, load_preset
from flowbench.plugin_sources import is_own, sources
from flowbench.prompts import choose_prompts
from flowbench.prompts.needs import check_run
from flowbench.reading.documents import DocumentError, read_yaml
from flowbench.record import RANDOM
from flowbench.registry import algorithms, rewards
from flowbench.requirements import (
    check_domain,
    check_group,
    check_judges,
    check_needs,
    check_resolution,
    check_scored,
    check_warmup,
    check_window,
)
from flowbench.sections import LARGEST_SEED, EvaluationConfig, Section, TrainingConfig
from flowbench.terms import combined_info, parse_reward, spell, term_names

if TYPE_CHECKING:
    from flowbench.algorithm import Algorithm, AlgorithmConfig, Defaults


S = TypeVar("S", bound=Section)

__all__ = ["EvaluationConfig", "RunConfig", "TrainingConfig", "load_run_config", "resolve_config"]


class RunConfig(Section):
    """All that decides what a run computes. `hyperparameters` is validated by the algorithm's own Config.

    prompts: in place of the preset's: a built-in set, or the absolute path of a folder or file (train and test are
    then cut from it). prompts_hash: over the content of the splits used, where they are not the preset's built-in ones.
    """

    algorithm: str
    reward: str
    model: str = "mini-sd3"
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    device: str = Field("auto", pattern=r"^[a-z]+(:[0-9]{1,3})?$")
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    prompts: str | None = None
    prompts_hash: str | None = None

    def prompt_set(self, preset: ModelPreset) -> str:
        """What the run's prompts are read from."""
        return self.prompts or preset.prompts

    def protocol(self) -> EvaluationConfig:
        """The evaluation with the noise of this run's seed: of seed k it is block k, and block 0 is the protocol's own.

        So methods are paired seed by seed, and the mean over seeds is over noise too.
        """
        if self.seed == 0:
            return self.evaluation
        from flowbench.seeding import seed_for

        block = seed_for(self.evaluation.seed, "noise-block", self.seed)
        return self.evaluation.model_copy(update={"seed": block})

    def undivided(self) -> RunConfig:
        """The same run with the work divided as the model and the algorithm say, whatever it says itself."""
        preset, cls = load_preset(self.model, resolve=False), algorithms.get(self.algorithm).cls
        changed = preset.settings(self.algorithm)["training"]
        training = {**preset.training, **_brought(cls, preset).training, **changed}
        return self.model_copy(
            update={
                "training": undivided(self.training, training),
                "evaluation": undivided(self.evaluation, preset.evaluation),
            }
        )

    def hash(self) -> str:
        """Ten hex digits over what decides the results, the contents of preset and prompt files included.

        That is everything but seed, device, and how the work is divided.
        """
        content = self.model_dump(mode="json", exclude={"seed", "device", "prompts", "prompts_hash"})
        same = self.undivided()
        content |= {"training": hashable(same.training), "evaluation": hashable(same.evaluation)}
        content["hyperparameters"] = _without_unused(self.hyperparameters, algorithms.get(self.algorithm).cls.Config)
        # Its defaults, and those that it takes from a model like it, are in the resolved settings already.
        resolved = {"training", "evaluation", "algorithms", "like"}
        preset = load_preset(self.model, resolve=False)
        content["preset"] = _without_unused(preset.model_dump(mode="json", exclude=resolved), type(preset))
        # Judges do not change what a run computes; clip was in every hash before there were others.
        used = {"clip", *term_names(self.reward)}
        known = content["preset"].get("rewards", {})
        content["preset"]["rewards"] = {name: known[name] for name in known if name in used}
        known_sources = sources(self.algorithm, term_names(self.reward))
        if foreign := {name: s.sha256 for name, s in known_sources.items() if not is_own(s)}:
            content["sources"] = foreign
        if self.prompts_hash:  # what the files hold decides, not where they lie
            content["preset"]["prompts"] = self.prompts_hash
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def undivided(section: S, usual: Mapping[str, Any] = MappingProxyType({})) -> S:
    """The section with what only divides or places the work as in `usual`, or else at its defaults."""
    fields = type(section).model_fields
    return section.model_copy(update={name: usual.get(name, fields[name].default) for name in section.divides})


def hashable(section: TrainingConfig | EvaluationConfig) -> dict[str, Any]:
    """A section's settings as they enter a hash."""
    return _without_unused(section.model_dump(mode="json", exclude=set(section.observes)), type(section))


def _without_unused(
    settings: dict[str, Any], kind: type[TrainingConfig | EvaluationConfig | AlgorithmConfig | ModelPreset]
) -> dict[str, Any]:
    """The settings without those that older records do not have and that are at their defaults: old hashes stay."""
    unused = {name: kind.model_fields[name].default for name in kind.added_later}
    return {name: value for name, value in settings.items() if name not in unused or value != unused[name]}


PRESET = "preset.yaml"  # a run's copy, beside its configuration

MOVED = {f"algorithm.{name}": f"training.{name}" for name in ("anchor_decay", "shared_noise")}  # earlier names

# How users spell the sections in `--set` and in configuration files.
SECTIONS = {"training": TrainingConfig, "evaluation": EvaluationConfig, "algorithm": None}


def resolve_config(
    algorithm: str,
    reward: str,
    model: str,
    *,
    overrides: dict[str, Any],
    seed: int = 0,
    device: str = "auto",
    prompts: str | None = None,
) -> RunConfig:
    """Settings from the general to the particular; each layer wins over those before it.

    The general defaults, the model's, the algorithm's for that model, what the model's preset changes of them, then
    `overrides` ({"training.images": 100}). None depends on the reward.

    prompts: a set's name, folder or file in place of the model's set; splits that it lacks are not evaluated, unless
    `overrides` asks for them. Raises UsageError for an unknown name or key, a wrong type or range, or needs that
    sampler, reward or prompts cannot meet.
    """
    preset = load_preset(model)
    info = algorithms.describe(algorithm)
    terms = parse_reward(reward)
    given = _by_section(overrides)
    # What is misspelt here is answered before the algorithm's module, and with it torch, is imported.
    validated(TrainingConfig, "training", given["training"])
    validated(EvaluationConfig, "evaluation", given["evaluation"])
    cls = algorithms.get(algorithm).cls
    own, changed = _brought(cls, preset), preset.settings(algorithm)
    model_training = {**preset.training, **_default_sampler(info.needs)}
    sections: dict[str, dict[str, Any]] = {
        "training": {**model_training, **own.training, **changed["training"], **given["training"]},
        "evaluation": {**preset.evaluation, **given["evaluation"]},
        "algorithm": {**own.algorithm, **changed["algorithm"], **given["algorithm"]},
    }
    evaluation: EvaluationConfig = validated(EvaluationConfig, "evaluation", sections["evaluation"])
    chosen = choose_prompts(prompts, preset.prompts, evaluation.splits, "evaluation.splits" in overrides)
    values = {
        "algorithm": algorithm,
        "reward": spell(terms),
        "model": model,
        "seed": seed,
        "device": device,
        "training": validated(TrainingConfig, "training", sections["training"]),
        "evaluation": evaluation.model_copy(update={"splits": chosen.splits}),
        "prompts": chosen.prompt_set,
        "prompts_hash": chosen.content_hash,
        "hyperparameters": validated(cls.Config, "algorithm", sections["algorithm"]).model_dump(mode="json"),
    }
    config: RunConfig = validated(RunConfig, "", values)
    check_domain(config, preset, combined_info(terms).domain)
    check_needs(info.needs, config, [t.name for t in terms if not combined_info((t,)).differentiable])
    check_window(config, preset)
    check_resolution(preset)
    check_warmup(config)
    check_group(config)
    check_judges(config.evaluation, config.reward)
    _check_kept(config.evaluation, preset)
    check_scored(config, preset)
    trained, judges = (map(rewards.describe, n) for n in (term_names(config.reward), evaluation.judges or ()))
    check_run(tuple(trained), tuple(judges), config.prompt_set(preset), chosen.splits)
    return config


def _by_section(overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"training.images": 100} as {"training": {"images": 100}, ...}, with all sections."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in overrides.items():
        section, dot, name = key.partition(".")
        if section not in sections or not dot:
            hint = did_you_mean(section, sections) if dot else f"; write section.key, with {', '.join(sections)}"
            raise UsageError(f"unknown setting '{key}'{hint}")
        sections[section][name] = value
    return sections


def check_settings(cls: type[Algorithm[Any]], training: Mapping[str, Any], algorithm: Mapping[str, Any]) -> None:
    """Raise UsageError for a setting that the loop or the algorithm does not know, or a value that it does not take."""
    validated(TrainingConfig, "training", dict(training))
    validated(cls.Config, "algorithm", dict(algorithm))


def _brought(cls: type[Algorithm[Any]], preset: ModelPreset) -> Defaults:
    """What the algorithm itself brings for the model, or else for the one that the model is like."""
    from flowbench.algorithm import Defaults

    for name in filter(None, (preset.name.removesuffix(RANDOM), preset.like)):
        if name in cls.defaults:
            found = cls.defaults[name]
            try:
                check_settings(cls, found.training, found.algorithm)
            except UsageError as error:
                raise UsageError(f"{cls.info.name}'s own defaults for model '{name}' are wrong: {error}") from error
            return found
    return Defaults()


def evaluation_config(preset: ModelPreset, overrides: dict[str, Any], reward: str | None = None) -> EvaluationConfig:
    """The model's protocol with `overrides` ({"evaluation.prompts": 12}), for a run on `reward` or for no run.

    Raises UsageError for an unknown key, a wrong type or range, or a judge that is unknown or the reward itself.
    """
    given = {key.removeprefix("evaluation."): value for key, value in overrides.items()}
    config: EvaluationConfig = validated(EvaluationConfig, "evaluation", {**preset.evaluation, **given})
    check_judges(config, reward)
    _check_kept(config, preset)
    return config


def _check_kept(config: EvaluationConfig, preset: ModelPreset) -> None:
    if config.keep_images and isinstance(preset, AnalyticPreset):
        raise UsageError(f"model '{preset.name}' makes points and no images; leave out --keep-images")


def _default_sampler(needs: frozenset[str]) -> dict[str, Any]:
    return {"sampler": "flow-sde"} if "log_prob" in needs else {}


def validated(model: type[BaseModel], section: str, values: dict[str, Any]) -> Any:
    """A section's settings, by full names in what is said of them.

    Raises UsageError that names the first that is unknown or has a value that it does not take.
    """
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, int) and abs(value) > LARGEST_SEED:
            full = f"{section}.{name}".lstrip(".")
            raise UsageError(f"setting '{full}' = {shortened(value, 40)}: no number of anything is so large")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        full = f"{section}.{name}".lstrip(".")
        if first["type"] == "extra_forbidden":
            if full in MOVED:
                raise UsageError(f"setting '{full}' is now '{MOVED[full]}'") from error
            raise UsageError(f"unknown setting '{full}'{did_you_mean(name, model.model_fields)}") from error
        said = first["msg"].splitlines()[0].removeprefix("Value error, ").lower()
        raise UsageError(f"setting '{full}' = {shortened(first['input'])}: {said}") from error


def load_run_config(path: Path) -> tuple[RunConfig, ModelPreset]:
    """The configuration that a run folder was made with, and its preset: the copy beside it, if there is one.

    Raises UsageError for a file that is no run's configuration.
    """
    try:
        config: RunConfig = validated(RunConfig, "", read_yaml(path))
    except (DocumentError, UsageError) as error:
        raise UsageError(f"'{path}' is no configuration of a run: {error}") from error
    copy = path.with_name(PRESET)
    return config, load_preset(str(copy) if copy.is_file() else config.model)
