"""Where the runs of a study are made: processes of this machine, a Ray cluster, or Slurm.

An executor is handed jobs and says what became of them. A run's results are in its folder, whoever made it, and a study
that was interrupted looks there and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from flowbench.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from flowbench.experiments.jobs import Job

POLL_SECONDS = 1.0
DIED = "worker died (killed, or out of memory)"
EXECUTORS = ("local", "ray", "slurm")


class Executor(Protocol):
    """Makes runs, several at a time."""

    def carry_out(
        self, jobs: Sequence[Job], plugins: Sequence[Path], running: Callable[[Job], None]
    ) -> Iterator[tuple[Job, str | None]]:
        """Make every job's run in its folder; gives each as it ends, with None or in one line why it failed.

        plugins: files that whoever makes a run loads first; running: is told about once a second of each job that is
        at work. A worker that dies costs its run a failure, and no other. When the iterator is closed, or the caller
        interrupted, nothing goes on.
        """
        ...


def make_executor(
    name: str,
    workers: int | None = None,
    cores: int = 1,
    gpus: int = 0,
    *,
    logs: Path = Path("slurm"),
    options: Mapping[str, str] | None = None,
) -> Executor:
    """The executor of that name.

    workers: runs at a time, None is one on this machine, and as many as there is room for elsewhere; cores, gpus: of
    each run. logs: folder of Slurm's own files; options: of Slurm, by submitit's names. Raises UsageError for an
    unknown name, a package that is not installed, or options where none are taken.
    """
    if name not in EXECUTORS:
        raise UsageError(f"unknown executor '{name}'{did_you_mean(name, EXECUTORS)}")
    if options and name != "slurm":
        raise UsageError(f"--slurm is for --executor slurm; executor '{name}' takes no such options")
    if name == "local":
        from flowbench.experiments.executors.local import LocalExecutor

        return LocalExecutor(workers or 1, cores, gpus)
    if name == "ray":
        from flowbench.experiments.executors.on_ray import RayExecutor

        return RayExecutor(workers, cores, gpus)
    from flowbench.experiments.executors.on_slurm import SlurmExecutor

    return SlurmExecutor(logs, workers, cores, gpus, dict(options or {}))


def executor_for(
    name: str,
    jobs: int | None,
    cores: int,
    gpus: int | None,
    device: str,
    output: Path,
    options: Mapping[str, str] | None = None,
) -> Executor:
    """The executor for runs on a device. jobs: runs at a time; gpus: of each, None as `default_gpus`; output: the
    folder below which Slurm's logs go; the others as in `make_executor`.

    Raises UsageError as `make_executor` does, and for a device that is not on this machine.
    """
    from flowbench.models.devices import pick_device

    if name == "local":
        pick_device(device)  # now, and not as the failure of every run
    each = default_gpus(name, device) if gpus is None else gpus
    return make_executor(name, jobs, cores, each, logs=output / "slurm", options=options)


def default_gpus(name: str, device: str) -> int:
    """GPUs of each run where nobody says: one where the runs are to be on GPUs, as far as this machine can tell."""
    if device != "auto" or name != "local":
        return int(device.startswith("cuda"))
    import torch

    return int(torch.cuda.is_available())


def require(package: str, extra: str) -> None:
    """Raise UsageError where a package of an extra is not installed."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise UsageError(f"package '{package}' is not installed; pip install 'flowbench[{extra}]'")
