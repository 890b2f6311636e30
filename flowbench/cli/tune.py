"""`flowbench tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowbench.cli.executors import (
    CoresOption,
    ExecutorOption,
    GpusOption,
    JobsOption,
    SlurmOption,
    chosen_executor,
)
from flowbench.cli.options import MOST, DeviceOption, PluginOption, new_folder
from flowbench.experiments.defaults import DEVICE, OUTPUT, SEARCHES, WORKLOAD

MOST_TRIALS = 10_000


def tune(
    algorithm: Annotated[list[str], typer.Argument(help="Algorithms, or all.")],
    workload: Annotated[str, typer.Option(help="Workload, or a workload's YAML file.")] = WORKLOAD,
    trials: Annotated[
        int | None, typer.Option(min=1, max=MOST_TRIALS, help="Of a study; by the rules 20, or 5.")
    ] = None,
    studies: Annotated[
        int, typer.Option(min=1, max=MOST, help="Independent ones; more than one is ruleset 'tuned'.")
    ] = 1,
    finalists: Annotated[
        int | None, typer.Option(min=0, max=MOST, help="Trials that run again; by the rules 3.")
    ] = None,
    more_seeds: Annotated[
        int | None, typer.Option(min=0, max=MOST, help="With so many more seeds; by the rules 2.")
    ] = None,
    sampler: Annotated[str, typer.Option(help="qmc, a scrambled Sobol sequence; tpe is outside the rules.")] = "qmc",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the scramble.")] = 0,
    settings: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override for every trial.")] = [],  # noqa: B006
    device: DeviceOption = DEVICE,
    plugin: PluginOption = [],  # noqa: B006
    executor: ExecutorOption = "local",
    jobs: JobsOption = None,
    cores: CoresOption = 1,
    gpus: GpusOption = None,
    slurm: SlurmOption = [],  # noqa: B006
    runs: Annotated[Path, typer.Option(callback=new_folder, help="Folder of run folders.")] = OUTPUT,
    output: Annotated[Path, typer.Option(callback=new_folder, help="Folder of logs and choices.")] = SEARCHES,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the first runs and what they cost.")] = False,
) -> None:
    """Search for settings of algorithms, the same for each, selected on dev; the same command continues."""
    from flowbench.experiments.tuning.api import asked
    from flowbench.settings import parse_assignments

    given = parse_assignments(settings)
    names, plan, places = asked(
        *(algorithm, workload, trials, studies, finalists, more_seeds, sampler, seed, given),
        *(device, plugin, runs, output),
    )

    from flowbench.cli.display import tune as display
    from flowbench.experiments.tuning.tune import planned
    from flowbench.experiments.tuning.tune import tune as search

    if dry_run:
        display.plan(planned(names, plan, places), plan)
        return
    where = chosen_executor(executor, jobs, cores, gpus, slurm, device, runs)
    from flowbench.cli.display.studies import StudyProgress

    with StudyProgress() as progress:
        found = search(names, plan, places, progress.listener(), executor=where)
    for result in found:
        display.study(result)
    display.summary(found)
