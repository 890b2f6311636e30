"""One study of one algorithm: its space, its log, the runs that it needs, and what it selects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowbench.config import RunConfig, resolve_config
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.statistics.search import expected_best
from flowbench.evaluation.statistics.targets import FLOOR
from flowbench.experiments.jobs import Job, Outcome, make_job
from flowbench.experiments.tuning.dev import DEV_ALONE, dev_result
from flowbench.experiments.tuning.files import CHOSEN, TRIALS, Chosen, trials_csv
from flowbench.experiments.tuning.journal import LOG, Attempt, Journal, Trial
from flowbench.experiments.tuning.plan import SearchPlan
from flowbench.experiments.tuning.selection import Candidate, finalists, select, worth
from flowbench.experiments.tuning.space import search_space
from flowbench.files import write_atomically
from flowbench.models.presets import AnalyticPreset, load_preset
from flowbench.prompts.sets import available_splits
from flowbench.record import code_commit, package_versions
from flowbench.registry import algorithms
from flowbench.reporting.search import SearchPicture, draw_search
from flowbench.reporting.style import drawing
from flowbench.workloads import Workload

PICTURE = "search"  # its stem
DEV = "dev"


@dataclass(frozen=True)
class Places:
    """Where runs and logs go, what they run on, and the files that register plug-ins. logs None: nothing is written."""

    runs: Path
    logs: Path | None
    device: str = "auto"
    plugins: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Request:
    """A run that a search needs: of a trial, with a seed."""

    search: Search
    trial: Trial
    seed: int


class Search:
    """A study. Raises UsageError where the algorithm cannot be searched on the workload, or the log is another's."""

    def __init__(self, algorithm: str, plan: SearchPlan, study: int, places: Places) -> None:
        self.algorithm, self.plan, self.study, self.places = algorithm, plan, study, places
        self.seeds = plan.run_seeds(study)
        workload, base = plan.workload, self._resolve({})
        self.images: int = base.training.images
        self.space = search_space(algorithms.get(algorithm).cls.search_space, self._resolve)
        self.folder = study_folder(places.logs, algorithm, plan, study) if places.logs else None
        identity = {
            "algorithm": algorithm,
            "workload": f"{workload.name} ({workload.hash})",
            "settings of the runs": base.hash(),  # all that is not searched
            "study": study,
        }
        seed = plan.seed + study
        self.journal = Journal(self.folder, f"{algorithm} on {workload.name}", self.space, plan.sampler, seed, identity)

    def _overrides(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.plan.workload.overrides(), **self.plan.settings, **settings, **DEV_ALONE}

    def _resolve(self, settings: Mapping[str, Any]) -> RunConfig:
        workload = self.plan.workload
        return resolve_config(
            self.algorithm,
            workload.reward,
            workload.model,
            overrides=self._overrides(settings),
            seed=self.seeds[0],
            device=self.places.device,
            prompts=workload.prompts,
        )

    def trials(self) -> list[Trial]:
        """Those of the plan, proposed so far; a log may have more, of a longer search."""
        return self.journal.trials(self.plan.trials)

    def first_runs(self, count: int) -> list[Request]:
        """The runs that the first `count` trials still need."""
        self.journal.propose(min(count, self.plan.trials))
        self.journal.settle()
        return [Request(self, trial, self.seeds[0]) for trial in self.trials()[:count] if not trial.attempts]

    def finalists(self) -> tuple[int, ...]:
        """The trials that run again, by their first runs."""
        count = self.plan.finalists if len(self.seeds) > 1 else 0
        return finalists([t.candidate.first for t in self.trials()], count)

    def further_runs(self) -> list[Request]:
        """The runs with further seeds that the finalists still need."""
        chosen = self.finalists()
        return [
            Request(self, trial, seed)
            for trial in self.trials()
            if trial.number in chosen
            for seed in self.seeds[1:]
            if seed not in {attempt.seed for attempt in trial.attempts}
        ]

    def job(self, request: Request) -> Job:
        """The run of a request. Raises UsageError for settings that cannot be run together."""
        study = f"study {self.study + 1} " if self.plan.studies > 1 else ""
        job = make_job(
            f"{self.algorithm} {study}trial {request.trial.number} seed {request.seed}",
            self.algorithm,
            self.plan.workload.reward,
            self.plan.workload.model,
            self._overrides(request.trial.settings),
            seed=request.seed,
            device=self.places.device,
            output=self.places.runs,
            plugins=self.places.plugins,
            prompts=self.plan.workload.prompts,
            stamp=self.plan.stamp,
        )
        return replace(job, lean=True)

    def selected(self) -> Candidate | None:
        """The trial that the study selects, None if none qualifies."""
        chosen = self.finalists()
        candidates = [t.candidate for t in self.trials() if not chosen or t.number in chosen]
        return select(candidates, len(self.seeds) if chosen else 1)

    def result(self) -> Chosen:
        """What the study comes to."""
        trials, best, plan = self.trials(), self.selected(), self.plan
        candidates = [trial.candidate for trial in trials]
        settings = dict(trials[best.number].settings) if best else {}
        return Chosen(
            algorithm=self.algorithm,
            workload=plan.workload,
            workload_hash=plan.workload.hash,
            ruleset=plan.ruleset,
            deviations=plan.deviations,
            study=self.study,
            sampler=plan.sampler,
            scramble_seed=plan.seed + self.study,
            run_seeds=self.seeds,
            trials=len(trials),
            failed=sum(candidate.failed for candidate in candidates),
            collapsed=sum(candidate.collapsed for candidate in candidates),
            selected=best.number if best else None,
            reason=_reason(best, candidates, len(self.finalists())),
            settings=settings,
            seeds_of_selected=self.seeds[: len(best.results)] if best else (),
            reward=best.reward if best else None,
            gain=best.gain if best else None,
            kept=best.kept if best else None,
            edges=self.space.edges(settings) if best else (),
            best_of=expected_best(worth(candidates)),
            space=self.space.spelled(),
            fixed=dict(self.space.fixed),
            refused_choices=self.space.refused,
            log=LOG,
            log_sha256=self.journal.sha256,
            commit=code_commit(),
            versions=package_versions(),
        )

    def write(self) -> Chosen:
        """Write trials, choice and picture beside the log."""
        result, trials = self.result(), self.trials()
        if self.folder:
            text = trials_csv(trials, result.selected, self.finalists())
            write_atomically(self.folder / TRIALS, text)
            result.save(self.folder / CHOSEN)
            with drawing(f"of the search in '{self.folder}'"):
                draw_search(self.folder / PICTURE, self._picture(trials, result))
        return result

    def _picture(self, trials: Sequence[Trial], result: Chosen) -> SearchPicture:
        known = [trial for trial in trials if not trial.candidate.first.failed]
        return SearchPicture(
            algorithm=self.algorithm,
            title=f"{self.algorithm} on {self.plan.workload.name}: {len(trials)} trials",
            reward=self.plan.workload.reward,
            best_of=result.best_of,
            gains=[trial.candidate.first.gain for trial in known],
            qualifies=[trial.candidate.first.qualifies for trial in known],
            selected=next((i for i, trial in enumerate(known) if trial.number == result.selected), None),
            dimensions={
                key: (dimension, [trial.settings[key] for trial in known])
                for key, dimension in self.space.dimensions.items()
            },
        )


def attempt_of(outcome: Outcome) -> Attempt:
    """What a finished or failed run says to a search."""
    seed, run = outcome.job.config.seed, outcome.job.folder.name
    if outcome.record is None or outcome.record.status == "failed":
        failure = outcome.failure or (outcome.record and outcome.record.failure)
        return Attempt(seed, run, None, failure or "failed")
    try:
        result = dev_result(outcome.record)
    except RunError as error:
        return Attempt(seed, run, None, str(error))
    if not all(map(math.isfinite, (result.reward, result.base_reward, result.kept))):
        return Attempt(seed, run, None, "reward or diversity on dev is no number")
    return Attempt(seed, run, result)


def study_folder(logs: Path, algorithm: str, plan: SearchPlan, study: int) -> Path:
    """<logs>/<model>/<algorithm>, and below it a folder for each of several studies of a workload."""
    folder = logs / load_preset(plan.workload.model).name / algorithm
    return folder if plan.studies == 1 else folder / f"{plan.workload.name}-study-{study + 1}"


def _reason(best: Candidate | None, candidates: Sequence[Candidate], chosen: int) -> str:
    if best is None:
        failed, collapsed = sum(c.failed for c in candidates), sum(c.collapsed for c in candidates)
        lost = f"{failed} failed and {collapsed} kept less than {FLOOR} of the base model's diversity"
        return f"no trial qualifies: of {len(candidates)}, {lost}"
    again = f" of the {chosen} best, which ran again with other seeds" if chosen else ""
    return (
        f"the highest mean reward on dev at the end of the budget{again}, among trials that keep {FLOOR} or more of "
        "the base model's diversity there"
    )


def check_dev(workload: Workload) -> None:
    """Raise UsageError for a workload whose prompts have no split `dev`: every run would be in vain."""
    preset = load_preset(workload.model)
    prompts = workload.prompts or preset.prompts
    if not isinstance(preset, AnalyticPreset) and DEV not in available_splits(prompts):
        raise UsageError(f"prompts '{prompts}' of workload '{workload.name}' have no split 'dev'; a search needs one")
