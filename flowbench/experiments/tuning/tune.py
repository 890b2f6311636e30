"""The search of one or several algorithms: runs of all of them share the processes, and the same call continues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from flowbench.errors import UsageError
from flowbench.experiments.executors import Executor
from flowbench.experiments.jobs import Job, Outcome
from flowbench.experiments.run import Listener
from flowbench.experiments.study import StudyListener, run_jobs
from flowbench.experiments.tuning.files import CHOSEN, STUDIES, Chosen, Studies, median_gain
from flowbench.experiments.tuning.journal import Attempt, Trial
from flowbench.experiments.tuning.plan import QMC, SearchPlan
from flowbench.experiments.tuning.search import Places, Request, Search, attempt_of, check_dev, study_folder
from flowbench.locks import locked
from flowbench.models.devices import pick_device

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

    workers, executor: as `run_jobs` has them; run: makes runs in its place. Trials that are in a log already are not
    repeated, failed ones neither.
    Raises UsageError before anything runs; BusyError when another process is at the same search; RunInterruptedError on
    Ctrl-C, and then the same call continues.
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
        stage = _Stage(make, listener, len(names) * plan.runs)
        # Without results every proposal is known at once; with them they come in turns.
        step = plan.trials if plan.sampler == QMC else workers
        for count in range(step, plan.trials + step, step):
            stage.carry_out([request for search in searches for request in search.first_runs(count)])
        stage.carry_out([request for search in searches for request in search.further_runs()])
        found = [StudyResult(s.write(), tuple(s.trials()), s.finalists(), s.folder) for s in searches]
        if plan.studies > 1:
            _write_studies(names, plan, places, found)
    return found


def planned(names: Sequence[str], plan: SearchPlan, places: Places) -> list[Request]:
    """The first runs that a search would make, had it no log yet; nothing is written."""
    check_dev(plan.workload)
    nowhere = Places(places.runs, None, places.device, places.plugins)
    searches = [Search(name, plan, study, nowhere) for name in names for study in range(plan.studies)]
    return [request for search in searches for request in search.first_runs(plan.trials)]


class _Stage:
    """Makes runs for searches, keeps their results as they come, and tells of them among all runs of the search."""

    def __init__(self, run: Runner, listener: StudyListener, total: int) -> None:
        self.run, self.listener, self.total, self.done = run, listener, total, 0

    def carry_out(self, requests: Sequence[Request]) -> None:
        """Make these runs."""
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
        kept: set[Path] = set()

        def keep(outcome: Outcome) -> None:
            if outcome.job.folder in kept:
                return
            kept.add(outcome.job.folder)
            requests = by_folder[outcome.job.folder]
            for request in requests:
                self._keep(request, attempt_of(outcome))

        before, total = self.done, max(self.total, self.done + len(jobs))

        def start(job: Job, done: int, _: int) -> AbstractContextManager[Listener]:
            return self.listener.on_start(job, before + done, total)

        def ended(outcome: Outcome, done: int, _: int) -> None:
            keep(outcome)
            self.listener.on_outcome(outcome, before + done, total)

        if jobs:
            # Also those that had finished when an earlier call was interrupted, of which `ended` is not told.
            for outcome in self.run(jobs, StudyListener(start, self.listener.on_training, ended)):
                keep(outcome)
        self.done += len(jobs)

    def _keep(self, request: Request, attempt: Attempt) -> None:
        request.search.journal.keep(request.trial.number, attempt)


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
