"""How much is searched, and whether that is what the rules of a comparison ask for (docs/tuning.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from flowbench.errors import UsageError
from flowbench.experiments.jobs import Stamp
from flowbench.experiments.rules import (
    FINALISTS,
    FIRST_SEED,
    MORE_SEEDS,
    STUDIES,
    STUDY_SEEDS,
    TRIALS,
    TRIALS_OF_STUDY,
)
from flowbench.experiments.suite import FREE
from flowbench.experiments.tuning.dev import DEV_ALONE
from flowbench.workloads import Workload

SamplerName: TypeAlias = Literal["qmc", "tpe"]
SEARCH = "search"  # in the records of runs that a search for ruleset "defaults" made
QMC: Literal["qmc"] = "qmc"


@dataclass(frozen=True)
class SearchPlan:
    """A search of one algorithm, or of several in the same way.

    trials: of each study; studies: independent repetitions with sequences and seeds of their own; finalists: how many
    of the best run again with `more_seeds` seeds; sampler: "qmc", a scrambled Sobol sequence, or "tpe", which the rules
    do not have; seed: of the first study's scramble; settings: overrides that hold for every trial.
    """

    workload: Workload
    trials: int = TRIALS
    studies: int = 1
    finalists: int = FINALISTS
    more_seeds: int = MORE_SEEDS
    sampler: SamplerName = QMC
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.trials, self.studies) < 1 or min(self.finalists, self.more_seeds, self.seed) < 0:
            raise UsageError("a search needs one trial and one study or more, and no number below zero")
        if own := sorted(DEV_ALONE.keys() & self.settings.keys()):
            raise UsageError(f"a search sets '{own[0]}' itself, since it sees split dev alone; leave it out of --set")
        if self.more_seeds >= STUDY_SEEDS:
            raise UsageError(f"--more-seeds is {self.more_seeds}; a study has {STUDY_SEEDS} seeds, use fewer")

    def run_seeds(self, study: int) -> tuple[int, ...]:
        """Training seeds of a study: its trials have the first, its finalists the others too."""
        first = FIRST_SEED + STUDY_SEEDS * study
        return tuple(range(first, first + 1 + (self.more_seeds if self.finalists else 0)))

    @property
    def runs(self) -> int:
        """How many runs an algorithm's search makes at most."""
        return self.studies * (self.trials + min(self.finalists, self.trials) * self.more_seeds)

    @property
    def ruleset(self) -> str | None:
        """ "defaults" or "tuned", the ruleset that asks for just this search; None outside of them."""
        return None if self.deviations else ("defaults" if self.studies == 1 else "tuned")

    @property
    def deviations(self) -> tuple[str, ...]:
        """What is not as the rules have it, in words."""
        tuned = self.studies > 1
        found: list[str] = []
        if self.sampler != QMC:
            found.append(f"the sampler is {self.sampler}; the rules have {QMC}")
        wanted = {"studies": STUDIES, "trials": TRIALS_OF_STUDY} if tuned else {"trials": TRIALS}
        wanted |= {"finalists": 0} if tuned else {"finalists": FINALISTS, "more_seeds": MORE_SEEDS}
        for name, value in wanted.items():
            if getattr(self, name) != value:
                found.append(f"{name.replace('_', ' ')}: {getattr(self, name)}; the rules have {value}")
        if by_hand := sorted(set(self.settings) - FREE):
            found.append(f"set by hand for every trial: {', '.join(by_hand)}")
        return tuple(found)

    @property
    def stamp(self) -> Stamp:
        """What the records of the search's runs say that they were made for."""
        ruleset = SEARCH if self.ruleset == "defaults" else self.ruleset
        return Stamp(ruleset, self.workload.name, self.workload.hash)


def search_plan(
    workload: Workload,
    trials: int | None = None,
    studies: int = 1,
    finalists: int | None = None,
    more_seeds: int | None = None,
    sampler: str = QMC,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> SearchPlan:
    """The plan with what is None as the rules have it: for one study those of "defaults", for several of "tuned".

    Raises UsageError for numbers that make no search, or an unknown sampler.
    """
    if sampler not in ("qmc", "tpe"):
        raise UsageError(f"unknown sampler '{sampler}'; use qmc, or tpe outside the rules")
    tuned = studies > 1
    return SearchPlan(
        workload=workload,
        trials=trials if trials is not None else (TRIALS_OF_STUDY if tuned else TRIALS),
        studies=studies,
        finalists=finalists if finalists is not None else (0 if tuned else FINALISTS),
        more_seeds=more_seeds if more_seeds is not None else (0 if tuned else MORE_SEEDS),
        sampler="tpe" if sampler == "tpe" else QMC,
        seed=seed,
        settings=dict(settings or {}),
    )
