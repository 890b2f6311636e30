"""Workloads: what is compared on. A model, a reward, prompts, a budget, a protocol and a target, frozen in a YAML file.

The built-in ones lie beside this file; whatever has the form of them is one too.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flowbench.errors import UsageError, did_you_mean, first_fault
from flowbench.prompts import locate
from flowbench.reading.documents import DocumentError, read_yaml
from flowbench.sections import EvaluationConfig
from flowbench.terms import parse_reward, spell

FOLDER = Path(__file__).parent

Named = TypeVar("Named", bound=BaseModel)


class Target(BaseModel):
    """What a run is to reach on split `dev`.

    metric: a name that scores have, such as "oracle_exact"; gains: the targets, tuned minus base; diversity: the least
    share of the base model's that must be kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    gains: tuple[float, ...] = Field(min_length=1)
    diversity: float = Field(0.9, ge=0, le=1)


class Workload(BaseModel):
    """One workload. It names no algorithm and no setting of one.

    model: a preset's name, a preset file, a pipeline's folder or hub id; reward: one, or a weighted sum; prompts: in
    place of the model's own set; images: the budget; evaluation: what the protocol has other than the model's preset;
    target: None until it is fixed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^\w[\w.+-]*$", max_length=80)
    version: int = Field(1, ge=1)
    summary: str = ""
    model: str
    reward: str
    prompts: str | None = None
    images: int = Field(ge=1)
    evaluation: dict[str, Any] = {}
    target: Target | None = None

    @field_validator("evaluation")
    @classmethod
    def _is_of_the_protocol(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in values:
            if name not in EvaluationConfig.model_fields:
                raise ValueError(f"unknown setting '{name}'{did_you_mean(name, EvaluationConfig.model_fields)}")
        return values

    @property
    def hash(self) -> str:
        """Ten hex digits over all that decides what is run and how it is scored.

        The target is not in it, since it is fixed from the results of such runs; nor are the summary, and where files
        lie: their contents are in the hash of a run's settings.
        """
        content = self.model_dump(mode="json", exclude={"summary", "target"})
        content |= {key: _without_folder(content[key]) for key in ("model", "prompts")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]

    def overrides(self) -> dict[str, Any]:
        """Budget and protocol as settings of a run, {"training.images": 2880, ...}."""
        return {"training.images": self.images, **{f"evaluation.{k}": v for k, v in self.evaluation.items()}}


def _without_folder(name: str | None) -> str | None:
    return Path(name).name if name and Path(name).is_absolute() else name


def workload_names() -> list[str]:
    """Names of the built-in workloads."""
    return names_in(FOLDER)


def place_of(name: str, what: str, built_in: Path, folder: Path = Path()) -> Path:
    """Where the YAML file of that name is: in the folder of those that are built in, or a path relative to `folder`.

    Raises UsageError for a name that is not built in; what: the kind of file, as it is called there.
    """
    if name.endswith((".yaml", ".yml")):
        return folder / name
    names = names_in(built_in)
    if name not in names:
        raise UsageError(f"unknown {what} '{name}'{did_you_mean(name, names)}")
    return built_in / f"{name}.yaml"


def names_in(folder: Path) -> list[str]:
    """The names of a folder's YAML files."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_as(kind: type[Named], path: Path, what: str) -> Named:
    """A YAML file's content, whose name is the file's unless it says another.

    Raises UsageError for a file that does not have the form.
    """
    try:
        return kind.model_validate({"name": path.stem, **read_yaml(path)})
    except (DocumentError, TypeError, ValidationError) as error:
        raise UsageError(f"{what} file '{path}' is not a {what}: {first_fault(error)}") from error


def load_workload(name: str, folder: Path = Path()) -> Workload:
    """The built-in workload of that name, or that of a YAML file, whose path is relative to `folder`.

    Model and prompts of a file may be paths relative to it. Raises UsageError for an unknown name, a file that is no
    workload, or a reward that is not known.
    """
    path = place_of(name, "workload", FOLDER, folder)
    workload = read_as(Workload, path, "workload")
    located: dict[str, Any] = {"reward": spell(parse_reward(workload.reward))}
    if path.parent != FOLDER:
        if (path.parent / workload.model).exists():
            located["model"] = str((path.parent / workload.model).resolve())
        if workload.prompts:
            located["prompts"] = locate(workload.prompts, path.parent)
    return workload.model_copy(update=located)
