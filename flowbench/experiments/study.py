"""Many runs in the ordinary run folders: finished ones are kept, unfinished ones continue, failures are reported."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowbench.config import RunConfig, resolve_config
from flowbench.errors import RunError, RunInterruptedError
from flowbench.experiments.run import DONE, RECORD, Listener, execute, run_folder
from flowbench.launch import check_alone
from flowbench.models.memory import release_memory
from flowbench.record import Record, load_record
from flowbench.registry import load_plugin_file
from flowbench.training.checkpoint import CHECKPOINT, METRICS

POLL_SECONDS = 1.0
INTERRUPTED = "interrupted; finished runs are kept, the same command continues"


@dataclass(frozen=True)
class Job:
    """One run to make; label tells it from the study's other runs, command makes the same run alone."""

    label: str
    config: RunConfig
    folder: Path
    command: str

    @property
    def done(self) -> bool:
        """Whether its folder holds the finished run."""
        return (self.folder / DONE).exists()

    @property
    def iterations(self) -> tuple[int, int]:
        """Training iterations done, and all of them."""
        t = self.config.training
        log = self.folder / METRICS
        lines = log.read_bytes().count(b"\n") if log.is_file() else 0
        return lines, math.ceil(t.images / (t.prompts_per_iteration * t.images_per_prompt))


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its record, or in one line why it has none."""

    job: Job
    record: Record | None
    failure: str | None = None


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


def make_job(
    label: str,
    algorithm: str,
    reward: str,
    model: str,
    overrides: dict[str, Any],
    *,
    seed: int,
    device: str,
    output: Path,
    plugins: Sequence[Path] = (),
) -> Job:
    """The job of one run; arguments as in `resolve_config`.

    Raises UsageError as `resolve_config` does.
    """
    config = resolve_config(algorithm, reward, model, overrides=overrides, seed=seed, device=device)
    words = ["flowbench", "run", algorithm, "--reward", reward, "--model", model, "--seed", str(seed)]
    words += [part for file in plugins for part in ("--plugin", str(file))]
    words += [part for key, value in overrides.items() for part in ("--set", f"{key}={spell(value)}")]
    return Job(label, config, run_folder(output, config), shlex.join(words))


def spell(value: Any) -> str:
    """A setting's value as one types it after `--set KEY=`."""
    return value if isinstance(value, str) else json.dumps(value)


def run_jobs(
    jobs: Sequence[Job], listener: StudyListener, workers: int = 1, plugins: Sequence[Path] = ()
) -> list[Outcome]:
    """Make all runs, `workers` at a time, each in a process of its own if there are several.

    A run that fails with RunError is an outcome and does not end the study. Raises RunInterruptedError on Ctrl-C, with
    everything saved: the same call continues.
    """
    check_alone("a study of many runs")
    todo = [job for job in jobs if not job.done]
    finished = [Outcome(job, load_record(job.folder / RECORD)) for job in jobs if job.done]
    begun = len(finished)
    if workers == 1:
        outcomes = _sequential(todo, listener, begun, len(jobs))
    else:
        outcomes = _parallel(todo, listener, workers, plugins)
    for outcome in outcomes:
        finished.append(outcome)
        listener.on_outcome(outcome, len(finished), len(jobs))
    order = {id(job): i for i, job in enumerate(jobs)}
    return sorted(finished, key=lambda outcome: order[id(outcome.job)])


def run_job(job: Job, listener: Listener = Listener()) -> Outcome:
    """Make one run, or continue it from its checkpoint."""
    try:
        resume = (job.folder / CHECKPOINT).exists()
        return Outcome(job, execute(job.config, job.folder, job.command, resume, listener))
    except RunInterruptedError:
        raise RunInterruptedError(INTERRUPTED) from None  # the run's own words ask for --resume
    except RunError as error:
        return Outcome(job, None, str(error))
    finally:
        release_memory()


def _sequential(jobs: Sequence[Job], listener: StudyListener, done: int, total: int) -> Iterator[Outcome]:
    for i, job in enumerate(jobs):
        with listener.on_start(job, done + i, total) as inner:
            outcome = run_job(job, inner)
        yield outcome


def _parallel(jobs: Sequence[Job], listener: StudyListener, workers: int, plugins: Sequence[Path]) -> Iterator[Outcome]:
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(plugins, threads))
    try:
        pending = {pool.submit(run_job, job): job for job in jobs}
        while pending:
            ready, _ = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
            for future, job in pending.items():
                if future.running():
                    listener.on_training(job, *job.iterations)
            yield from (_result(future, pending.pop(future)) for future in ready)
    except KeyboardInterrupt:
        raise RunInterruptedError(INTERRUPTED) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[Outcome], job: Job) -> Outcome:
    outcome = future.result()
    return Outcome(job, outcome.record, outcome.failure)


def _begin_worker(plugins: Sequence[Path], threads: int) -> None:
    # A training run answers Ctrl-C by itself; an evaluation is finished first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    for file in plugins:
        load_plugin_file(file)
