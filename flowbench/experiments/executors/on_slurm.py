"""Runs as Slurm jobs, by submitit."""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowbench.errors import UsageError
from flowbench.experiments.executors import DIED, POLL_SECONDS, require
from flowbench.experiments.executors.worker import Place, Worker, end_with
from flowbench.experiments.jobs import Job

# submitit's names that are not Slurm's alone; others get its prefix "slurm_".
SHARED = ("cluster", "name", "timeout_min", "mem_gb", "nodes", "stderr_to_stdout", "tasks_per_node")
DAY = 24 * 60


@dataclass(frozen=True)
class SlurmExecutor:
    """A Slurm job for each run.

    logs: submitit's folder, on a file system that all machines share, as the run folders and plug-in files are;
    workers: jobs in the queue at a time, None is all; cores, gpus: of each; options: submitit's, such as
    {"partition": "gpu", "timeout_min": "120"}; "cluster" is "slurm", or "local" for processes of this machine.
    """

    logs: Path
    workers: int | None = None
    cores: int = 1
    gpus: int = 0
    options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require("submitit", "slurm")
        if self._cluster == "slurm" and not shutil.which("srun"):
            raise UsageError("there is no Slurm on this machine (no srun); use --executor local")

    @property
    def _cluster(self) -> str:
        return self.options.get("cluster", "slurm")

    def carry_out(
        self, jobs: Sequence[Job], plugins: Sequence[Path], running: Callable[[Job], None]
    ) -> Iterator[tuple[Job, str | None]]:
        """See Executor."""
        submit = self._submitit().submit
        here = os.getpid() if self._cluster == "local" else None
        place, files = Place(self.cores, Path.cwd()), [file.resolve() for file in plugins]
        waiting, busy = deque(jobs), list[tuple[Any, Job]]()
        try:
            while waiting or busy:
                while waiting and (self.workers is None or len(busy) < self.workers):
                    job = waiting.popleft()
                    errand = Errand(replace(job, folder=job.folder.resolve()), tuple(files), place, here)
                    busy.append((submit(errand), job))
                ended = [pair for pair in busy if pair[0].done()]
                busy = [pair for pair in busy if pair not in ended]
                for submitted, job in ended:
                    yield job, _failure(submitted)
                for submitted, job in busy:
                    if submitted.state == "RUNNING":
                        running(job)
                if not ended:
                    time.sleep(POLL_SECONDS)
        finally:
            for submitted, _ in busy:
                submitted.cancel()

    def _submitit(self) -> Any:
        import submitit

        own = {
            key if key in SHARED else f"slurm_{key.removeprefix('slurm_')}": _number(value)
            for key, value in self.options.items()
            if key != "cluster"
        }
        settings = {"name": "flowbench", "timeout_min": DAY, "cpus_per_task": self.cores, **own}
        if self.gpus:
            settings["gpus_per_node"] = self.gpus
        try:
            executor = submitit.AutoExecutor(folder=self.logs, cluster=self._cluster)
            executor.update_parameters(**settings)
        except (NameError, TypeError, ValueError) as error:
            raise UsageError(f"--slurm: {str(error).splitlines()[0]}; the names are submitit's") from error
        return executor


@dataclass(frozen=True)
class Errand:
    """What a Slurm job does. process: it ends with that process of its machine."""

    job: Job
    plugins: tuple[Path, ...]
    place: Place
    process: int | None = None

    def __call__(self) -> str | None:
        """Make the run; None, or in one line why it failed."""
        if self.process is not None:
            end_with(self.process)
        return Worker(self.place).make(self.job, self.plugins)

    def checkpoint(self) -> Any:
        """What submitit queues when Slurm takes the machine away or the time is over: the run goes on from its own."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def _failure(submitted: Any) -> str | None:
    """None, or in one line why the run failed."""
    from submitit.core.utils import UncompletedJobError

    try:
        failure: str | None = submitted.result()
    except UncompletedJobError:
        return f"{DIED}; Slurm job {submitted.job_id}, its log is {submitted.paths.stderr}"
    return failure


def _number(text: str) -> str | int:
    return int(text) if text.isdigit() else text
