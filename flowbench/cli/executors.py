"""Options of commands that make many runs: where, how many at a time, and on how many cores and GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowbench.cli.options import MOST
from flowbench.errors import UsageError

if TYPE_CHECKING:
    from flowbench.experiments.executors import Executor

ExecutorOption = Annotated[str, typer.Option(help="local, ray or slurm.")]
JobsOption = Annotated[
    int | None, typer.Option(min=1, max=MOST, help="Runs at a time; default 1, elsewhere what there is room for.")
]
CoresOption = Annotated[
    int, typer.Option(min=1, max=MOST, help="Cores of each run; other numbers may round otherwise.")
]
GpusOption = Annotated[
    int | None, typer.Option(min=0, max=MOST, help="GPUs of each run; default: 1 where it uses one.")
]
SlurmOption = Annotated[
    list[str], typer.Option("--slurm", metavar="KEY=VALUE", help="Option of Slurm, as submitit names it; repeatable.")
]


def chosen_executor(
    name: str, jobs: int | None, cores: int, gpus: int | None, slurm: Sequence[str], device: str, output: Path
) -> Executor:
    """The executor that the options ask for; `output`: the folder below which Slurm's logs go.

    Raises UsageError for a device that is not here, or options that do not fit.
    """
    from flowbench.experiments.executors import executor_for

    return executor_for(name, jobs, cores, gpus, device, output, slurm_options(slurm))


def slurm_options(given: Sequence[str]) -> dict[str, str]:
    """Slurm's options from KEY=VALUE.

    Raises UsageError for one that has no such form.
    """
    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--slurm {text!r} has no '='; write --slurm partition=gpu")
        options[key.strip()] = value.strip()
    return options
