"""Suites: workloads x algorithms x seeds from a YAML file, as jobs of a study.

The built-in ones lie in `suites` beside this file. What a suite runs is in its file; where it runs is not, so that all
executors leave the same records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from flowbench.config import SECTIONS
from flowbench.errors import NotApplicableError, UsageError
from flowbench.experiments.jobs import Job, Stamp, State, kept_failure, make_job, with_seeds
from flowbench.registry import algorithms
from flowbench.sections import EvaluationConfig, TrainingConfig
from flowbench.workloads import Workload, load_workload, names_in, place_of, read_as

FOLDER = Path(__file__).parent / "suites"
STATES: tuple[State, ...] = get_args(State)

# Settings that only divide or observe the work, and so are free under every ruleset; but targets need the points.
FREE = {f"training.{name}" for name in (*TrainingConfig.divides, *TrainingConfig.observes)}
FREE |= {f"evaluation.{name}" for name in (*EvaluationConfig.divides, "dev_judges", "keep_images")}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Seeds(_Part):
    """`count` seeds, from `first` on."""

    count: int = Field(ge=1)
    first: int = Field(0, ge=0)


class Runs(_Part):
    """Each of the workloads with each of the algorithms ("all": every one that is installed) and each of the seeds."""

    workloads: tuple[str, ...] = Field(min_length=1)
    algorithms: tuple[str, ...] | Literal["all"] = "all"
    seeds: tuple[int, ...] | Seeds

    @field_validator("seeds")
    @classmethod
    def _are_seeds(cls, value: tuple[int, ...] | Seeds) -> tuple[int, ...] | Seeds:
        if isinstance(value, tuple) and (not value or min(value) < 0 or len(set(value)) < len(value)):
            raise ValueError("seeds are different numbers from 0")
        return value

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds in their order."""
        if isinstance(self.seeds, Seeds):
            return tuple(range(self.seeds.first, self.seeds.first + self.seeds.count))
        return self.seeds


class Suite(_Part):
    """What is to be run.

    ruleset: the one that its results are to be shown under, None for none; settings: of every run, by full names;
    plugins: files that register algorithms or rewards, relative to the suite's.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    version: int = Field(1, ge=1)
    summary: str = ""
    ruleset: Literal["defaults", "tuned"] | None = None
    runs: tuple[Runs, ...] = Field(min_length=1)
    settings: dict[str, Any] = {}
    plugins: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _keeps_the_rules(self) -> Suite:
        for key in self.settings:
            if key.partition(".")[0] not in SECTIONS:
                raise ValueError(f"unknown setting '{key}'; write section.key, with {', '.join(SECTIONS)}")
            if self.ruleset is not None and key not in FREE:
                raise ValueError(
                    f"setting '{key}' is not free under ruleset {self.ruleset}, where every method has its own; "
                    "take it out, or the ruleset"
                )
        return self


@dataclass(frozen=True)
class Cell:
    """One algorithm on one workload: its jobs, one per seed, or why it is not applicable."""

    workload: Workload
    algorithm: str
    jobs: tuple[Job, ...]
    not_applicable: str | None = None

    def counts(self) -> dict[State, int]:
        """How many of its runs are in each state."""
        found = Counter(job.state for job in self.jobs)
        return {state: found[state] for state in STATES}

    def failures(self) -> list[str]:
        """A line for each run that failed."""
        said = ((job, kept_failure(job)) for job in self.jobs)
        return [f"{job.label}: {failure}" for job, failure in said if failure is not None]


@dataclass(frozen=True)
class Loaded:
    """A suite as it was read: its plug-in files and workloads by the names that it calls them, found from anywhere."""

    suite: Suite
    plugins: tuple[Path, ...]
    workloads: Mapping[str, Workload]


def suite_names() -> list[str]:
    """Names of the built-in suites."""
    return names_in(FOLDER)


def load_suite(name: str) -> Loaded:
    """The built-in suite of that name, or that of a YAML file, with its workloads.

    Raises UsageError for an unknown name, a file that is no suite, settings that its ruleset does not allow, or a
    workload that cannot be read.
    """
    path = place_of(name, "suite", FOLDER)
    suite = read_as(Suite, path, "suite")
    named = dict.fromkeys(name for part in suite.runs for name in part.workloads)
    workloads = {name: load_workload(name, path.parent) for name in named}
    return Loaded(suite, tuple((path.parent / file).resolve() for file in suite.plugins), workloads)


def plan(loaded: Loaded, output: Path, device: str, plugins: Sequence[Path] = ()) -> list[Cell]:
    """All cells, workload by workload. Plug-ins are loaded already; plugins: files beside those of the suite.

    Raises UsageError for an unknown algorithm, a cell that stands twice, or settings that a run cannot have; what an
    algorithm needs and a workload has not makes a cell that is not applicable.
    """
    suite, cells = loaded.suite, []
    # With settings that are not free, a run is none of the workload.
    pure = all(key in FREE for key in suite.settings)
    for part in suite.runs:
        names = algorithms.names() if part.algorithms == "all" else part.algorithms
        for workload in (loaded.workloads[name] for name in part.workloads):
            stamp = Stamp(suite.ruleset, workload.name, workload.hash) if pure else None
            for algorithm in names:
                where: dict[str, Any] = {"output": output, "device": device, "plugins": [*loaded.plugins, *plugins]}
                cells.append(cell(workload, algorithm, part.seed_list, suite.settings, stamp, **where))
    return _none_twice(cells)


def cell(
    workload: Workload,
    algorithm: str,
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    stamp: Stamp | None = None,
    **where: Any,
) -> Cell:
    """One algorithm on one workload; stamp: what its records say that they are for; `where` as in `make_job`.

    Raises UsageError as `make_job` does.
    """
    label = f"{workload.name}, {algorithm}"
    try:
        first = make_job(
            label,
            algorithm,
            workload.reward,
            workload.model,
            {**workload.overrides(), **settings},
            seed=seeds[0],
            prompts=workload.prompts,
            stamp=stamp,
            **where,
        )
    except NotApplicableError as error:
        return Cell(workload, algorithm, (), str(error))
    return Cell(workload, algorithm, with_seeds(first, label, seeds))


def all_jobs(cells: Sequence[Cell]) -> list[Job]:
    """The runs to make: every workload's seed by seed, so that all algorithms have a first result early."""
    ordered: list[Job] = []
    for name in dict.fromkeys(c.workload.name for c in cells):
        ordered += _seed_by_seed([c.jobs for c in cells if c.workload.name == name])
    return ordered


def _seed_by_seed(rows: Sequence[tuple[Job, ...]]) -> Iterator[Job]:
    for k in range(max(map(len, rows), default=0)):
        yield from (row[k] for row in rows if k < len(row))


def _none_twice(cells: list[Cell]) -> list[Cell]:
    seen: dict[Path, str] = {}
    for job in (job for c in cells for job in c.jobs):
        if job.folder in seen:
            raise UsageError(f"'{seen[job.folder]}' and '{job.label}' are the same run; take one out of the suite")
        seen[job.folder] = job.label
    return cells
