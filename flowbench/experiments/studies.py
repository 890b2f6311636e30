"""Studies of a suite: each is a search, and the run of the setting that it selected, with a seed that no search uses.

The searches are those of `flowbench tune --studies`, in the same folders; what this module adds are the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbench.errors import NotApplicableError, UsageError
from flowbench.experiments.executors import Executor
from flowbench.experiments.jobs import Job, Outcome, Stamp, keep_failure, kept_failure, make_job
from flowbench.experiments.run import Listener
from flowbench.experiments.study import StudyListener, run_jobs
from flowbench.experiments.suite import FREE, Cell, Loaded, Studies, Suite
from flowbench.experiments.tuning.files import CHOSEN, Chosen, read_chosen
from flowbench.experiments.tuning.plan import SearchPlan, search_plan
from flowbench.experiments.tuning.search import Places, Request, study_folder
from flowbench.experiments.tuning.tune import planned, tune
from flowbench.registry import algorithms


@dataclass(frozen=True)
class Result:
    """A study's result: the run of its selected trial. lost: why there is none, because no trial qualifies; the job is
    then that of its first trial, where the failure is kept, and is never run."""

    study: int
    job: Job
    lost: str | None = None


@dataclass(frozen=True)
class Studied:
    """The studies of one algorithm on one workload. results: of those that have ended."""

    cell: Cell
    plan: SearchPlan
    results: tuple[Result, ...]


def studied(loaded: Loaded, places: Places) -> list[Studied]:
    """All studies of a suite, as their logs say; nothing is written. Plug-ins are loaded already.

    Raises UsageError for an unknown algorithm, settings that a run cannot have, or a choice that cannot be read.
    """
    suite, found = loaded.suite, []
    for part in suite.runs:
        if part.studies is None:
            continue
        names = algorithms.names() if part.algorithms == "all" else part.algorithms
        for workload in (loaded.workloads[name] for name in part.workloads):
            plan = search_plan(
                workload,
                part.studies.trials,
                part.studies.count,
                finalists=0,
                more_seeds=0,
                seed=part.studies.scramble,
                settings=suite.settings,
            )
            found += [_studied(suite, part.studies, name, plan, places) for name in names]
    return found


def carry_out(
    loaded: Loaded, places: Places, listener: StudyListener, executor: Executor | None, retry_failed: bool
) -> list[Outcome]:
    """Make all searches, and then the results, study by study. What is there already is not made again.

    A study that selects nothing is a failed run. Raises as `tune` and `run_jobs` do; the same call continues.
    """
    found = studied(loaded, places)
    total = sum(one.cell.runs for one in found)
    trials = total - sum(len(one.results) + one.cell.later for one in found)
    for plan in {id(one.plan): one.plan for one in found}.values():
        names = [one.cell.algorithm for one in found if one.plan is plan and one.cell.later]
        if names:
            tune(names, plan, places, _among(listener, 0, total), executor=executor)
    results = [result for one in studied(loaded, places) for result in one.results]
    for result in results:
        if result.lost is not None and kept_failure(result.job) is None:
            keep_failure(result.job, result.lost)
    # Study by study, so that all algorithms have a first result early.
    jobs = [r.job for r in sorted(results, key=lambda r: r.study) if r.lost is None]
    outcomes = run_jobs(
        *(jobs, _among(listener, trials, total)), plugins=places.plugins, executor=executor, retry_failed=retry_failed
    )
    return [*outcomes, *(Outcome(r.job, None, r.lost) for r in results if r.lost is not None)]


def _among(listener: StudyListener, before: int, total: int) -> StudyListener:
    """The listener, told of some runs as part of all."""

    def start(job: Job, done: int, _: int) -> AbstractContextManager[Listener]:
        return listener.on_start(job, before + done, total)

    def ended(outcome: Outcome, done: int, _: int) -> None:
        listener.on_outcome(outcome, before + done, total)

    return StudyListener(start, listener.on_training, ended)


def _studied(suite: Suite, studies: Studies, algorithm: str, plan: SearchPlan, places: Places) -> Studied:
    workload = plan.workload
    try:
        requests = planned([algorithm], plan, places)
    except NotApplicableError as error:
        return Studied(Cell(workload, algorithm, (), str(error), studies=True), plan, ())
    trials: dict[Path, Job] = {}  # two trials may differ in nothing that a run feels
    for request in requests:
        if job := _trial(request):
            trials.setdefault(job.folder, job)
    results = []
    for study in range(studies.count):
        chosen = _chosen(algorithm, plan, study, places)
        if chosen is not None:
            tried = [request for request in requests if request.search.study == study]
            results.append(_result(suite, studies, chosen, tried, places))
    jobs = (*trials.values(), *(result.job for result in results))
    cell = Cell(workload, algorithm, jobs, later=studies.count - len(results), studies=True)
    return Studied(cell, plan, tuple(results))


def _trial(request: Request) -> Job | None:
    """The run of a trial; None for settings that cannot be run together."""
    try:
        return request.search.job(request)
    except UsageError:
        return None


def _chosen(algorithm: str, plan: SearchPlan, study: int, places: Places) -> Chosen | None:
    """What a study selected; None if it has not ended, or is not this one."""
    path = study_folder(places.logs, algorithm, plan, study) / CHOSEN if places.logs else None
    if path is None or not path.is_file():
        return None
    found = read_chosen(path)
    ours = (plan.workload.hash, study, plan.seed + study, plan.run_seeds(study), plan.trials, plan.ruleset)
    theirs = (found.workload_hash, found.study, found.scramble_seed, found.run_seeds, found.trials, found.ruleset)
    return found if ours == theirs else None


def _result(suite: Suite, studies: Studies, chosen: Chosen, tried: Sequence[Request], places: Places) -> Result:
    if chosen.selected is not None:
        return Result(chosen.study, _job(suite, studies, chosen, chosen.settings, places))
    for request in tried:  # of settings that a run can have, for the record of the failure
        try:
            job = _job(suite, studies, chosen, request.trial.settings, places)
        except UsageError:
            continue
        return Result(chosen.study, job, f"study {chosen.study + 1}: {chosen.reason}")
    return Result(chosen.study, _job(suite, studies, chosen, {}, places), f"study {chosen.study + 1}: {chosen.reason}")


def _job(suite: Suite, studies: Studies, chosen: Chosen, settings: Mapping[str, Any], places: Places) -> Job:
    workload = chosen.workload
    pure = all(key in FREE for key in suite.settings)
    return make_job(
        f"{workload.name}, {chosen.algorithm}, study {chosen.study + 1}",
        chosen.algorithm,
        workload.reward,
        workload.model,
        {**workload.overrides(), **suite.settings, **settings},
        seed=studies.result_seeds[chosen.study],
        device=places.device,
        output=places.runs,
        plugins=places.plugins,
        prompts=workload.prompts,
        stamp=Stamp(suite.ruleset, workload.name, workload.hash) if pure else None,
    )
