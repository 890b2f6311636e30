"""What `--model NAME` means: one YAML file per model. An algorithm's defaults for it stand in the algorithm's file."""

from __future__ import annotations

import os
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, field_validator

from flowbench.errors import UsageError, did_you_mean, first_fault
from flowbench.models.families import family_entry
from flowbench.models.presets.undescribed import described, find_pipeline, is_hub_id
from flowbench.names import component_fault
from flowbench.prompts import prompt_sets
from flowbench.reading.documents import MAX_BYTES, DocumentError, parse_yaml
from flowbench.reading.texts import TextError, read_text
from flowbench.record import RANDOM
from flowbench.sections import EvaluationConfig, TrainingConfig

FOLDER = Path(__file__).parent
EMBEDDED = "embedded:"  # a source within the package's testbed weights
ANALYTIC = "analytic:"  # a source that is a formula
Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
ALGORITHM_SECTIONS = ("training", "algorithm")  # of a preset's settings of an algorithm
OWN_SPACING: Literal["pipeline"] = "pipeline"  # of a sampler's steps: that of the pipeline's own call


class ModelPreset(BaseModel):
    """A model and how it is sampled, with the defaults of runs on it.

    source: hub id, folder, or "embedded:NAME"; family: of its pipeline, see models/families; resolution in pixels: the
    side of a square, or (height, width); dtype: of the weights on a GPU, cpu_dtype: on a CPU; num_steps and
    guidance_scale of sampling (1 is none); sigma_spacing: of the sampler's steps, wherever the model is sampled: as
    the pipeline's own call has it, or "linspace", equal steps before the model's shift (docs/sampling.md); rewards:
    constructor arguments per reward; training, evaluation: overrides of the general defaults. Algorithms bring their
    own defaults for the models that they know by name; like: the built-in model whose defaults they use if they do not
    know this one. algorithms: settings laid over those, for an algorithm of another package or to change one on this
    model, in the sections training and algorithm; the same for every reward.
    random_init: weights, also those of the rewards, are drawn at random instead of read; to measure, not to compare.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    added_later: ClassVar = frozenset({"cpu_dtype", "family", "random_init", "sigma_spacing"})

    name: str
    source: str
    family: str = "sd3"
    revision: str | None = None
    licence: str
    resolution: PositiveInt | tuple[PositiveInt, PositiveInt]
    num_steps: PositiveInt
    guidance_scale: float
    sigma_spacing: Literal["pipeline", "linspace"] = OWN_SPACING
    max_sequence_length: int
    has_t5: bool
    dtype: Precision = "float32"
    cpu_dtype: Precision = "float32"
    prompts: str
    rewards: dict[str, dict[str, Any]] = {}
    training: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    like: str | None = None
    algorithms: dict[str, dict[str, dict[str, Any]]] = {}
    random_init: bool = False

    @field_validator("name")
    @classmethod
    def _is_part_of_a_path(cls, value: str) -> str:
        """The run folder has it as a component."""
        if fault := component_fault(value):
            raise ValueError(f"{value!r}: a name {fault}")
        return value

    @field_validator("resolution")
    @classmethod
    def _square_is_one_number(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        """One spelling and so one hash of the same size."""
        return value[0] if isinstance(value, tuple) and value[0] == value[1] else value

    @property
    def height(self) -> int:
        """H of an image, in pixels."""
        return self.resolution if isinstance(self.resolution, int) else self.resolution[0]

    @property
    def width(self) -> int:
        """W of an image, in pixels."""
        return self.resolution if isinstance(self.resolution, int) else self.resolution[1]

    def settings(self, algorithm: str) -> dict[str, dict[str, Any]]:
        """What the preset itself says of an algorithm, by section."""
        own = self.algorithms.get(algorithm, {})
        return {name: own.get(name, {}) for name in ALGORITHM_SECTIONS}

    def resolve_source(self) -> str:
        """The folder or hub id to load; a folder of that name below FLOWBENCH_WEIGHTS comes first."""
        return resolve_weights(self.source)

    @property
    def remedy(self) -> str:
        """What to do when the weights are missing."""
        if self.source.startswith(EMBEDDED):
            return "rebuild it with 'flowbench testbed build'"
        if not is_hub_id(self.source):
            return "check that folder, or use another with --model FOLDER"
        return (
            f"accept its licence at https://huggingface.co/{self.source}, then 'hf auth login' and "
            f"'hf download {self.source}'; or set FLOWBENCH_WEIGHTS to a folder that contains it, or use --model FOLDER"
        )


class AnalyticPreset(ModelPreset):
    """A model of points in the plane with a known distribution, source "analytic:gaussian" or "analytic:mixture".

    density: the arguments of that distribution, see flowbench/testbeds/plane/density.py.
    """

    family: str = "plane"
    resolution: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    guidance_scale: float = 1.0
    max_sequence_length: int = 1
    has_t5: bool = False
    density: dict[str, Any]

    @property
    def density_kind(self) -> str:
        """ "gaussian" or "mixture"."""
        return self.source.removeprefix(ANALYTIC)


def resolve_weights(source: str) -> str:
    """A local folder for "embedded:NAME" or for a hub id mirrored below FLOWBENCH_WEIGHTS, else the source itself."""
    if source.startswith(EMBEDDED):
        from flowbench.testbeds.shapes.weights import weights_folder

        return str(weights_folder() / source.removeprefix(EMBEDDED))
    mirror = os.environ.get("FLOWBENCH_WEIGHTS")
    if mirror and (Path(mirror) / source).exists():
        return str(Path(mirror) / source)
    return source


def preset_names() -> list[str]:
    """Names of the built-in presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_preset(name: str, resolve: bool = True) -> ModelPreset:
    """The preset of that name, of that YAML file, or of a pipeline's folder or hub id that no preset describes.

    With " (random)" behind it: the same model with random weights.

    Paths in a file are relative to it: source, prompts, and arguments of rewards that name something beside the file
    become absolute, unless `resolve` is False (for a hash, which must not say where a file lies).
    Raises UsageError for an unknown name, a file that is no preset, or a pipeline that no family serves.
    """
    if name.endswith(RANDOM):
        return _with_random_weights(load_preset(name.removesuffix(RANDOM), resolve))
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        folder = find_pipeline(name, resolve_weights(name))
        if folder is not None:
            try:
                return ModelPreset.model_validate(described(name, folder))
            except ValidationError as error:
                raise UsageError(f"model '{name}' cannot be described: {first_fault(error)}") from error
        raise UsageError(f"unknown model '{name}'{_remedy(name)}")
    try:
        content = deepcopy(_parsed(read_text(path, MAX_BYTES)))
        kind = AnalyticPreset if str(content.get("source")).startswith(ANALYTIC) else ModelPreset
        preset: ModelPreset = kind.model_validate({"name": path.stem, **content})
    except (DocumentError, TextError, AttributeError, TypeError, ValidationError) as error:
        no_mapping = isinstance(error, AttributeError | TypeError)
        fault = "it is no mapping of keys to values" if no_mapping else first_fault(error)
        raise UsageError(f"model file '{path}' is not a preset: {fault}") from error
    _check_names(preset, path)
    return with_absolute_paths(preset, path.parent) if resolve and path.parent != FOLDER else preset


@lru_cache(maxsize=64)
def _parsed(text: str) -> Any:
    """YAML takes long to read, and a run looks at its model's file at every checkpoint."""
    return parse_yaml(text)


def _with_random_weights(preset: ModelPreset) -> ModelPreset:
    if isinstance(preset, AnalyticPreset):
        raise UsageError(f"model '{preset.name}' is a formula and has no weights; run it without --random-init")
    return preset.model_copy(update={"name": preset.name + RANDOM, "random_init": True})


def _check_names(preset: ModelPreset, path: Path) -> None:
    try:
        family_entry(preset.family)
    except UsageError as error:
        raise UsageError(f"model file '{path}': {error}") from error
    for section, kind, given in (
        ("training", TrainingConfig, preset.training),
        ("evaluation", EvaluationConfig, preset.evaluation),
    ):
        for name in given.keys() - kind.model_fields.keys():
            hint = did_you_mean(str(name), kind.model_fields)
            raise UsageError(f"model file '{path}' has the unknown setting '{section}.{name}'{hint}")
    for algorithm, sections in preset.algorithms.items():
        for section in set(sections) - set(ALGORITHM_SECTIONS):
            raise UsageError(
                f"model file '{path}' has settings of {algorithm} under '{section}'; use training and algorithm: no "
                "setting may depend on the reward's name"
            )
    if preset.like is not None and preset.like not in preset_names():
        known = did_you_mean(preset.like, preset_names())
        raise UsageError(f"model file '{path}' is like '{preset.like}', which is no built-in model{known}")


def with_absolute_paths(preset: ModelPreset, folder: Path) -> ModelPreset:
    """The preset with absolute paths for whatever it names that lies in this folder."""

    def located(value: Any) -> Any:
        if not isinstance(value, str) or not value or not os.path.exists(folder / value):
            return value
        return str((folder / value).resolve())

    prompts = preset.prompts if preset.prompts in prompt_sets() else located(preset.prompts)
    rewards = {name: {k: located(v) for k, v in arguments.items()} for name, arguments in preset.rewards.items()}
    return preset.model_copy(update={"source": located(preset.source), "prompts": prompts, "rewards": rewards})


def _remedy(name: str) -> str:
    if is_hub_id(name):
        return f"; it is neither below FLOWBENCH_WEIGHTS nor in the hub's cache, fetch it with 'hf download {name}'"
    if Path(name).is_dir():
        return "; that folder has no model_index.json"
    return did_you_mean(name, preset_names())
