"""A run as a job of a study: what it is, how it is made, and what became of it."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flowbench.config import RunConfig, resolve_config
from flowbench.errors import BusyError, RunError, RunInterruptedError, UsageError
from flowbench.experiments.folder import DONE, RECORD, run_folder
from flowbench.experiments.outcome import failed_record
from flowbench.experiments.run import Listener, execute
from flowbench.locks import holder
from flowbench.models.memory import release_memory
from flowbench.record import Record, load_record
from flowbench.training.checkpoint import METRICS, checkpoint_files

INTERRUPTED = "interrupted; finished runs are kept, the same command continues"

BUSY_SECONDS = 30.0  # a worker whose study was killed ends within that, and its lock with it

State = Literal["done", "running", "interrupted", "failed", "missing"]


@dataclass(frozen=True)
class Stamp:
    """What a run is made for; it stands in its record. ruleset: "defaults", "tuned", "search" or None."""

    ruleset: str | None
    workload: str
    workload_hash: str


@dataclass(frozen=True)
class Job:
    """One run to make; label tells it from the study's other runs, command makes the same run alone.

    lean: it is one of many trials, and leaves no pictures and no checkpoint.
    """

    label: str
    config: RunConfig
    folder: Path
    command: str
    stamp: Stamp | None = None
    lean: bool = False

    @property
    def done(self) -> bool:
        """Whether its folder holds the finished run."""
        return (self.folder / DONE).exists()

    @property
    def state(self) -> State:
        """What its folder says, and whether a process works there."""
        if self.done:
            return "done"
        if holder(self.folder) is not None:
            return "running"
        if kept_failure(self) is not None:
            return "failed"
        return "interrupted" if self.folder.is_dir() else "missing"

    @property
    def iterations(self) -> tuple[int, int]:
        """Training iterations done, and all of them."""
        t = self.config.training
        log = self.folder / METRICS
        lines = log.read_bytes().count(b"\n") if log.is_file() else 0
        return lines, math.ceil(t.images / (t.prompts_per_iteration * t.images_per_prompt))


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its record, or in one line why it has none.

    cut_off: the run did not fail by itself: its worker died, the disk is full, or another process has its folder.
    """

    job: Job
    record: Record | None
    failure: str | None = None
    cut_off: bool = False


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
    prompts: str | None = None,
    stamp: Stamp | None = None,
) -> Job:
    """The job of one run; arguments as in `resolve_config`.

    Raises UsageError as `resolve_config` does.
    """
    config = resolve_config(algorithm, reward, model, overrides=overrides, seed=seed, device=device, prompts=prompts)
    words = ["flowbench", "run", algorithm, "--reward", reward, "--model", model, "--seed", str(seed)]
    words += ["--prompts", prompts] if prompts else []
    words += [part for file in plugins for part in ("--plugin", str(file))]
    words += [part for key, value in overrides.items() for part in ("--set", f"{key}={spell(value)}")]
    return Job(label, config, run_folder(output, config), shlex.join(words), stamp)


def with_seeds(first: Job, label: str, seeds: Iterable[int]) -> tuple[Job, ...]:
    """The same run with each of these seeds, labelled "<label>, seed <seed>"; its settings are not resolved again."""
    words = shlex.split(first.command)
    place = words.index("--seed") + 1
    stem = first.folder.name.rpartition("-s")[0]
    return tuple(
        replace(
            first,
            label=f"{label}, seed {seed}",
            config=first.config.model_copy(update={"seed": seed}),
            folder=first.folder.with_name(f"{stem}-s{seed}"),
            command=shlex.join([*words[:place], str(seed), *words[place + 1 :]]),
        )
        for seed in seeds
    )


def spell(value: Any) -> str:
    """A setting's value as one types it after `--set KEY=`."""
    return value if isinstance(value, str) else json.dumps(value)


def run_job(job: Job, listener: Listener = Listener()) -> Outcome:
    """Make one run, or continue it from its checkpoint."""
    patience = time.monotonic() + BUSY_SECONDS
    try:
        while True:
            try:
                resume = job.done or bool(checkpoint_files(job.folder))
                return Outcome(job, execute(job.config, job.folder, job.command, resume, listener, lean=job.lean))
            except BusyError:
                if time.monotonic() > patience:
                    raise
                time.sleep(1)
    except RunInterruptedError as error:
        raise RunInterruptedError(INTERRUPTED, error.signal) from None  # the run's own words ask for --resume
    except RunError as error:
        return Outcome(job, None, str(error))
    finally:
        release_memory()


def settled(job: Job) -> Outcome | None:
    """What became of a job that has ended before, or None. Its record says from now on what the run was made for.

    Raises UsageError for a finished run that was made for another workload or ruleset, or whose record cannot be read.
    """
    if not job.done:
        failure = kept_failure(job)
        return None if failure is None else Outcome(job, None, failure)
    record = load_record(job.folder / RECORD)
    if job.stamp is None:
        return Outcome(job, record)
    theirs, ours = ({name: getattr(of, name) for name in vars(job.stamp)} for of in (record, job.stamp))
    if any(value is not None and theirs[name] not in (None, value) for name, value in ours.items()):
        made, asked = (f"{w['workload']} ({w['workload_hash']}), ruleset {w['ruleset']}" for w in (theirs, ours))
        raise UsageError(
            f"the run in '{job.folder}' was made for workload {made}, not for {asked}; use another --output"
        )
    said = {name: theirs[name] if value is None else value for name, value in ours.items()}
    if said != theirs:
        record = record.model_copy(update=said)
        record.save(job.folder / RECORD)
    return Outcome(job, record)


def kept_failure(job: Job) -> str | None:
    """In one line why the run failed when it was last made, or None."""
    path = job.folder / RECORD
    if job.done or not path.is_file():
        return None
    try:
        record = load_record(path)
    except UsageError:
        return None  # an unfinished run's record counts for nothing
    return record.failure or "failed" if record.status == "failed" else None


def forget_failure(job: Job) -> None:
    """The run is to be made again: from its checkpoint, if it has one."""
    if kept_failure(job) is not None and holder(job.folder) is None:
        (job.folder / RECORD).unlink(missing_ok=True)


def keep_failure(job: Job, failure: str) -> None:
    """Leave a record of a run that failed, in the place of that of a finished one; not where a process is at work."""
    if job.done or holder(job.folder) is not None:
        return
    record = failed_record(job.config, job.command, failure)
    record.model_copy(update=vars(job.stamp) if job.stamp else {}).save(job.folder / RECORD)
