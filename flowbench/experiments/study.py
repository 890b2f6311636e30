"""Many runs in the ordinary run folders: finished ones are kept, unfinished ones continue, failures are results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from signal import SIGINT

from flowbench.errors import RunInterruptedError, TerminatedError
from flowbench.experiments.executors import DIED, Executor
from flowbench.experiments.jobs import (
    INTERRUPTED,
    Job,
    Outcome,
    Stamp,
    forget_failure,
    keep_failure,
    make_job,
    run_job,
    settled,
    spell,
)
from flowbench.experiments.run import Listener
from flowbench.launch import check_alone
from flowbench.models.devices import pick_device

__all__ = ["Job", "Outcome", "Stamp", "StudyListener", "make_job", "run_job", "run_jobs", "spell"]


NO_SPACE = "No space left on device"  # as the system says it


@dataclass(frozen=True)
class StudyListener:
    """Where a study tells how far it is.

    on_start: a job begins in this process, with runs done and all runs; gives the run's own listener. on_training: the
    iterations done, and all, of a job in another process. on_outcome: a job has ended, with runs done and all runs.
    """

    on_start: Callable[[Job, int, int], AbstractContextManager[Listener]] = lambda job, done, total: nullcontext(
        Listener()
    )
    on_training: Callable[[Job, int, int], None] = lambda job, done, total: None
    on_outcome: Callable[[Outcome, int, int], None] = lambda outcome, done, total: None


def run_jobs(
    jobs: Sequence[Job],
    listener: StudyListener,
    workers: int = 1,
    plugins: Sequence[Path] = (),
    *,
    executor: Executor | None = None,
    retry_failed: bool = True,
) -> list[Outcome]:
    """Make all runs: by the executor, or else in this process, or `workers` at a time in processes of their own.

    A run that fails is an outcome, leaves a record that says so, and does not end the study; retry_failed: those that
    failed in an earlier call are made again, from their checkpoints. Raises RunInterruptedError on Ctrl-C, with
    everything saved: the same call continues; UsageError for a finished run that was made for something else.
    """
    check_alone("a study of many runs")
    finished, todo = [], []
    for job in jobs:
        outcome = settled(job)
        if outcome is None or (outcome.failure and retry_failed):
            todo.append(job)
        else:
            finished.append(outcome)
    if executor is None and workers > 1:
        from flowbench.experiments.executors.local import LocalExecutor

        executor = LocalExecutor(workers, cores=None)
    elif executor is None and todo:
        pick_device(todo[0].config.device)  # now, and not as the failure of every run
    begun = len(finished)
    for job in todo:
        forget_failure(job)
    if executor is None:
        outcomes = _here(todo, listener, begun, len(jobs))
    else:
        outcomes = _elsewhere(todo, listener, executor, plugins)
    for outcome in outcomes:
        finished.append(outcome)
        listener.on_outcome(outcome, len(finished), len(jobs))
    order = {id(job): i for i, job in enumerate(jobs)}
    return sorted(finished, key=lambda outcome: order[id(outcome.job)])


def _here(jobs: Sequence[Job], listener: StudyListener, done: int, total: int) -> Iterator[Outcome]:
    for i, job in enumerate(jobs):
        with listener.on_start(job, done + i, total) as inner:
            outcome = run_job(job, inner)
        yield _kept(job, outcome.failure)


def _elsewhere(
    jobs: Sequence[Job], listener: StudyListener, executor: Executor, plugins: Sequence[Path]
) -> Iterator[Outcome]:
    try:
        for job, failure in executor.carry_out(jobs, plugins, lambda job: listener.on_training(job, *job.iterations)):
            yield _kept(job, failure)
    except (KeyboardInterrupt, TerminatedError) as error:
        raise RunInterruptedError(INTERRUPTED, getattr(error, "signal", SIGINT)) from None


def _kept(job: Job, failure: str | None) -> Outcome:
    """The outcome as the run's folder has it, which is the one place where results are."""
    if failure is not None:
        keep_failure(job, failure)
    outcome = settled(job)
    if outcome is None and failure is not None:
        return Outcome(job, None, failure, cut_off=True)  # another process is at it, and its folder is left alone
    if outcome is None:
        keep_failure(job, "it left no record; is its folder on a file system that all machines share?")
        outcome = settled(job)
    assert outcome is not None
    return replace(outcome, cut_off=failure is not None and _of_the_machine(failure))


def _of_the_machine(failure: str) -> bool:
    """Whether a failure says nothing of the run, which may do well at another time."""
    return failure.startswith((DIED, "MemoryError")) or NO_SPACE in failure
