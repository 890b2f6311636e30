"""`flowbench tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowbench.cli.options import MOST, DeviceOption, PluginOption, new_folder
from flowbench.errors import UsageError
from flowbench.experiments.defaults import DEVICE, OUTPUT, SEARCHES, WORKLOAD

MOST_TRIALS = 10_000


def tune(
    algorithm: Annotated[list[str], typer.Argument(help="Algorithms; see 'flowbench list algorithms'.")],
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
    jobs: Annotated[int, typer.Option(min=1, max=MOST, help="Runs at a time, each in a process of its own.")] = 1,
    runs: Annotated[Path, typer.Option(callback=new_folder, help="Folder of run folders.")] = OUTPUT,
    output: Annotated[Path, typer.Option(callback=new_folder, help="Folder of logs and choices.")] = SEARCHES,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the first runs and what they cost.")] = False,
) -> None:
    """Search for an algorithm's settings as for every other's, selected on dev; the same command continues."""
    if sampler not in ("qmc", "tpe"):
        raise UsageError(f"unknown sampler '{sampler}'; use qmc, or tpe outside the rules")
    from flowbench.registry import algorithms, load_plugin_file
    from flowbench.settings import parse_assignments
    from flowbench.workloads import load_workload

    for file in plugin:
        load_plugin_file(file)
    for name in algorithm:
        algorithms.describe(name)  # a misspelling is answered before torch is imported
    chosen, given = load_workload(workload), parse_assignments(settings)

    from flowbench.cli.display import tune as display
    from flowbench.experiments.tuning.plan import search_plan
    from flowbench.experiments.tuning.search import Places
    from flowbench.experiments.tuning.tune import planned
    from flowbench.experiments.tuning.tune import tune as search

    plan = search_plan(
        chosen,
        trials,
        studies,
        finalists,
        more_seeds,
        sampler="tpe" if sampler == "tpe" else "qmc",
        seed=seed,
        settings=given,
    )
    places = Places(runs, output, device, tuple(plugin))
    if dry_run:
        display.plan(planned(algorithm, plan, places), plan)
        return
    from flowbench.cli.display.studies import StudyProgress

    with StudyProgress() as progress:
        found = search(algorithm, plan, places, progress.listener(), jobs)
    for result in found:
        display.study(result)
    display.summary(found)
