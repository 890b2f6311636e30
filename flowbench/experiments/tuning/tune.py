"""The search of one or several algorithms: runs of all of them share the processes, and the same call continues."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TypeAlias

from flowbench.errors import NotApplicableError, RunError, UsageError
from flowbench.experiments.executors import DIED, Executor
from flowbench.experiments.jobs import Job, Outcome
from flowbench.experiments.run import Listener
from flowbench.experiments.study import StudyListener, run_jobs
from flowbench.experiments.tuning.files import CHOSEN, STUDIES, Chosen, Studies, median_gain
from flowbench.experiments.tuning.journal import Attempt, Trial
from flowbench.experiments.tuning.plan import QMC, SearchPlan
from flowbench.experiments.tuning.search import Places, Request, Search, attempt_of, check_dev, study_folder
from flowbench.locks import locked
from flowbench.models.devices import pick_device
from flowbench.registry import algorithms

logger = logging.getLogger("flowbench")

Runner: TypeAlias = Callable[[Sequence[Job], StudyListener], Sequence[Outcome]]


@dataclass(frozen=True)
class StudyResult:
    """One study of one algorithm: its choice, trials, and the numbers of those that ran again; folder: of its log."""

    chosen: Chosen
    trials: tuple[Trial, ...]
    finalists: tuple[int, ...]
    folder: Path | None


def tune(
    names: Sequence[str],
    plan: SearchPlan,
    places: Places,
    listener: StudyListener = StudyListener(),
    workers: int = 1,
    executor: Executor | None = None,
    run: Runner | None = None,
) -> list[StudyResult]:
    """Search for settings of each algorithm as the plan says, and write what was found; in the order of the names.

    workers, executor: as `run_jobs` has them; run: makes runs in its place. Runs of all algorithms wait in one queue,
    trial by trial, so that a search that is stopped early has as many of each. Runs that are in a log already are not
    repeated, neither are those that failed by themselves; a run that was cut off is made again.
    Raises UsageError before anything runs; BusyError when another process is at the same search; RunInterruptedError on
    Ctrl-C, RunError for runs that were cut off twice: then the same call continues.
    """
    if len(set(names)) < len(names):
        raise UsageError("an algorithm is named twice; name each once")
    check_dev(plan.workload)
    pick_device(places.device)
    make: Runner = run or (lambda jobs, told: run_jobs(jobs, told, workers, places.plugins, executor=executor))
    nowhere = replace(places, logs=None)
    for name in names:  # what cannot be searched is answered before anything is written
        Search(name, plan, 0, nowhere)
    with ExitStack() as held:
        logs = places.logs
        for folder in (
            [study_folder(logs, name, plan, k) for name in names for k in range(plan.studies)] if logs else ()
        ):
            held.enter_context(locked(folder, f"the search in '{folder}'"))
        searches = [Search(name, plan, study, places) for name in names for study in range(plan.studies)]
        stage = _Stage(make, listener, searches)
        # Without results every proposal is known at once; with them they come in turns.
        step = plan.trials if plan.sampler == QMC else workers
        for count in range(step, plan.trials + step, step):
            stage.carry_out(_in_turns([search.first_runs(count) for search in searches]))
        stage.carry_out(_in_turns([search.further_runs() for search in searches]))
        found = [StudyResult(s.write(), tuple(s.trials()), s.finalists(), s.folder) for s in searches]
        if plan.studies > 1:
            _write_studies(names, plan, places, found)
    return found


def searchable(plan: SearchPlan, places: Places) -> list[str]:
    """The installed algorithms that can be run on the plan's workload; says of each other why it cannot."""
    nowhere, found = replace(places, logs=None), []
    for name in algorithms.names():
        try:
            Search(name, plan, 0, nowhere)
        except NotApplicableError as error:
            logger.warning("'%s' is not searched: %s", name, error)
        else:
            found.append(name)
    return found


def planned(names: Sequence[str], plan: SearchPlan, places: Places) -> list[Request]:
    """The first runs that a search would make, had it no log yet; nothing is written."""
    check_dev(plan.workload)
    nowhere = Places(places.runs, None, places.device, places.plugins)
    searches = [Search(name, plan, study, nowhere) for name in names for study in range(plan.studies)]
    return [request for search in searches for request in search.first_runs(plan.trials)]


def _in_turns(requests: Sequence[Sequence[Request]]) -> list[Request]:
    """The first of each search, then the second of each, and so on."""
    return [request for turn in zip_longest(*requests) for request in turn if request is not None]


class _Stage:
    """Makes runs for searches, keeps their results as they come, and tells of them among all runs of the searches."""

    def __init__(self, run: Runner, listener: StudyListener, searches: Sequence[Search]) -> None:
        self.run, self.listener = run, listener
        self.total = sum(search.plan.runs // search.plan.studies for search in searches)
        self.done = sum(len(trial.attempts) for search in searches for trial in search.trials())

    def carry_out(self, requests: Sequence[Request]) -> None:
        """Make these runs, those that are cut off a second time when all others are made.

        Raises RunError for those that are cut off again, unless their worker died: of that they are the cause.
        """
        left = self._make(requests, last=False)
        left = self._make([request for _, requests in left for request in requests], last=True) if left else []
        if left:
            outcome, _ = left[0]
            raise RunError(
                f"{len(left)} runs were cut off and are no results, the first is {outcome.job.label}: "
                f"{outcome.failure}; mend that, and the same command makes them"
            )

    def _make(self, requests: Sequence[Request], last: bool) -> list[tuple[Outcome, list[Request]]]:
        """Make these runs and keep what became of them; gives those that were cut off."""
        by_folder: dict[Path, list[Request]] = {}  # two trials may differ in nothing that a run feels
        jobs: list[Job] = []
        for request in requests:
            try:
                job = request.search.job(request)
            except UsageError as error:  # each setting is valid, but not together
                self._keep(request, Attempt(request.seed, "", None, f"refused: {error}"))
                continue
            if job.folder not in by_folder:
                jobs.append(job)
            by_folder.setdefault(job.folder, []).append(request)
        if not jobs:
            return []
        kept: set[Path] = set()
        cut_off: dict[Path, Outcome] = {}
        before, total = self.done, max(self.total, self.done + len(jobs))

        def keep(outcome: Outcome) -> None:
            folder, died = outcome.job.folder, (outcome.failure or "").startswith(DIED)
            if outcome.cut_off and not (last and died):
                cut_off[folder] = outcome
            elif folder not in kept:
                kept.add(folder)
                told = replace(outcome, failure=f"{outcome.failure}, twice") if outcome.cut_off else outcome
                for request in by_folder[folder]:
                    self._keep(request, attempt_of(told))

        def start(job: Job, done: int, _: int) -> AbstractContextManager[Listener]:
            return self.listener.on_start(job, before + done, total)

        def ended(outcome: Outcome, done: int, _: int) -> None:
            keep(outcome)
            self.listener.on_outcome(outcome, before + done, total)

        # Also those that had finished when an earlier call was interrupted, of which `ended` is not told.
        for outcome in self.run(jobs, StudyListener(start, self.listener.on_training, ended)):
            keep(outcome)
        return [(outcome, by_folder[folder]) for folder, outcome in cut_off.items()]

    def _keep(self, request: Request, attempt: Attempt) -> None:
        request.search.journal.keep(request.trial.number, attempt)
        self.done += 1


def _write_studies(names: Sequence[str], plan: SearchPlan, places: Places, found: Sequence[StudyResult]) -> None:
    for name in names:
        own = [result for result in found if result.chosen.algorithm == name]
        gains = tuple(result.chosen.gain for result in own)
        if places.logs:
            folders = [study_folder(places.logs, name, plan, study) for study in range(plan.studies)]
            files = tuple(f"{folder.name}/{CHOSEN}" for folder in folders)
            studies = Studies(
                algorithm=name,
                workload=plan.workload,
                workload_hash=plan.workload.hash,
                ruleset=plan.ruleset,
                gains=gains,
                median=median_gain(gains),
                files=files,
            )
            studies.save(folders[0].parent / f"{plan.workload.name}-{STUDIES}")
