"""Suites: workloads x algorithms x seeds from a YAML file, as jobs of a study.

The built-in ones lie in `suites` beside this file. What a suite runs is in its file; where it runs is not, so that all
executors leave the same records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from flowbench.config import SECTIONS
from flowbench.errors import NotApplicableError, UsageError
from flowbench.experiments.folder import RECORD
from flowbench.experiments.jobs import Job, Stamp, State, kept_failure, make_job, with_seeds
from flowbench.experiments.rules import FIRST_SEED, STUDIES, STUDY_SEEDS, TRIALS_OF_STUDY
from flowbench.record import load_record
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


class Studies(_Part):
    """`count` searches of `trials` trials for each algorithm on each workload, each with points and seeds of its own.

    The result of study k is the setting that it selects, run with seed `first` + k, which no search uses; scramble: of
    the first study's sequence, that of the others follow it.
    """

    count: int = Field(STUDIES, ge=2, le=100)
    trials: int = Field(TRIALS_OF_STUDY, ge=1)
    first: int = Field(0, ge=0)
    scramble: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _result_seeds_are_free(self) -> Studies:
        if self.first + self.count > FIRST_SEED:
            raise ValueError(f"results of studies have seeds below {FIRST_SEED}, where those of searches begin")
        return self

    @property
    def result_seeds(self) -> tuple[int, ...]:
        """Of the results, study by study."""
        return tuple(range(self.first, self.first + self.count))


class Runs(_Part):
    """Each of the workloads with each of the algorithms ("all": every one that is installed), and each of the seeds, or
    studies."""

    workloads: tuple[str, ...] = Field(min_length=1)
    algorithms: tuple[str, ...] | Literal["all"] = "all"
    seeds: tuple[int, ...] | Seeds | None = None
    studies: Studies | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Runs:
        if (self.seeds is None) == (self.studies is None):
            raise ValueError("a part has seeds, or studies in their place")
        return self

    @field_validator("seeds")
    @classmethod
    def _are_seeds(cls, value: tuple[int, ...] | Seeds | None) -> tuple[int, ...] | Seeds | None:
        if isinstance(value, tuple) and (not value or min(value) < 0 or len(set(value)) < len(value)):
            raise ValueError("seeds are different numbers from 0")
        return value

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds of all runs in their order, those of studies' results before those of their trials."""
        if self.studies is not None:
            trials = (FIRST_SEED + STUDY_SEEDS * study for study in range(self.studies.count))
            return (*self.studies.result_seeds, *trials)
        if isinstance(self.seeds, Seeds):
            return tuple(range(self.seeds.first, self.seeds.first + self.seeds.count))
        return self.seeds or ()


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
        for part in self.runs:
            found = part.studies and (part.studies.count, part.studies.trials)
            if self.ruleset == "tuned" and found != (STUDIES, TRIALS_OF_STUDY):
                raise ValueError(f"ruleset tuned has {STUDIES} studies of {TRIALS_OF_STUDY} trials, and no other runs")
            if self.ruleset == "defaults" and found:
                raise ValueError("ruleset defaults has seeds, and no studies; they are of ruleset tuned")
        return self


@dataclass(frozen=True)
class Cell:
    """One algorithm on one workload: its jobs, one per seed, or why it is not applicable.

    Of studies the jobs are the trials, and the results of those studies that have ended; later: how many results there
    will be of the others; studies: whether it is one of them.
    """

    workload: Workload
    algorithm: str
    jobs: tuple[Job, ...]
    not_applicable: str | None = None
    later: int = 0
    studies: bool = False

    @property
    def runs(self) -> int:
        """How many runs there will be in all."""
        return len(self.jobs) + self.later

    def counts(self) -> dict[State, int]:
        """How many of its runs are in each state."""
        found = Counter(job.state for job in self.jobs)
        return {state: found[state] + self.later * (state == "missing") for state in STATES}

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
    """All cells of runs with seeds, workload by workload; those of studies are in `studies`.

    Plug-ins are loaded already; plugins: files beside those of the suite.

    Raises UsageError for an unknown algorithm, a cell that stands twice, or settings that a run cannot have; what an
    algorithm needs and a workload has not makes a cell that is not applicable.
    """
    suite, cells = loaded.suite, []
    # With settings that are not free, a run is none of the workload.
    pure = all(key in FREE for key in suite.settings)
    for part in (part for part in suite.runs if part.studies is None):
        names = algorithms.names() if part.algorithms == "all" else part.algorithms
        for workload in (loaded.workloads[name] for name in part.workloads):
            stamp = Stamp(suite.ruleset, workload.name, workload.hash) if pure else None
            for algorithm in names:
                where: dict[str, Any] = {"output": output, "device": device, "plugins": [*loaded.plugins, *plugins]}
                cells.append(cell(workload, algorithm, part.seed_list, suite.settings, stamp, **where))
    return none_twice(cells)


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


def seconds_left(cells: Sequence[Cell]) -> float | None:
    """What the runs that are not done will take one after another, by those that are; None before the first is.

    A run takes what those of its cell took in the mean, or of all cells where it is the first of its own.
    """
    took = [[_took(job) for job in c.jobs if job.done] for c in cells]
    everywhere = [seconds for times in took for seconds in times]
    if not everywhere:
        return None
    means = [fmean(times or everywhere) for times in took]
    return sum(mean * (c.runs - len(times)) for c, times, mean in zip(cells, took, means, strict=True))


def _took(job: Job) -> float:
    costs = load_record(job.folder / RECORD).costs
    return sum(costs.seconds.values()) if costs else 0.0


def _seed_by_seed(rows: Sequence[tuple[Job, ...]]) -> Iterator[Job]:
    for k in range(max(map(len, rows), default=0)):
        yield from (row[k] for row in rows if k < len(row))


def none_twice(cells: list[Cell]) -> list[Cell]:
    """The cells; raises UsageError where one run is in two of them."""
    seen: dict[Path, str] = {}
    for job in (job for c in cells for job in c.jobs):
        if job.folder in seen:
            raise UsageError(f"'{seen[job.folder]}' and '{job.label}' are the same run; take one out of the suite")
        seen[job.folder] = job.label
    return cells
