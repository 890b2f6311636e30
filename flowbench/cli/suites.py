"""`flowbench suite` and `flowbench compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowbench.cli.options import (
    LARGEST_SEED,
    MOST,
    MOST_SEEDS,
    DeviceOption,
    ModelOption,
    OutputOption,
    PlaceOption,
    PluginOption,
    PromptsOption,
    SettingsOption,
)
from flowbench.errors import RunError, UsageError
from flowbench.experiments.defaults import DEVICE, MODEL, OUTPUT, REWARD

if TYPE_CHECKING:
    from flowbench.experiments.executors import Executor
    from flowbench.experiments.study import Outcome
    from flowbench.experiments.suite import Cell

app = typer.Typer(no_args_is_help=True, help="Workloads x algorithms x seeds from a file.", rich_markup_mode=None)

SuiteArgument = Annotated[str, typer.Argument(metavar="SUITE", help="A built-in suite's name, or a YAML file.")]
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
RetryOption = Annotated[bool, typer.Option("--retry-failed", help="Make runs again that failed earlier.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the runs and their state.")]


@app.command()
def run(
    suite: SuiteArgument,
    executor: ExecutorOption = "local",
    jobs: JobsOption = None,
    cores: CoresOption = 1,
    gpus: GpusOption = None,
    slurm: SlurmOption = [],  # noqa: B006 - typer wants the default itself
    device: DeviceOption = DEVICE,
    plugin: PluginOption = [],  # noqa: B006
    output: OutputOption = OUTPUT,
    retry_failed: RetryOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Make a suite's runs; the same command continues, finished and failed runs are kept."""
    from flowbench.cli.display import suites as display

    cells, plugins = _planned(suite, output, device, plugin)
    if dry_run:
        display.plan(cells)
        return
    where = _executor(executor, jobs, cores, gpus, slurm, device, output)
    from flowbench.experiments.suite import load_suite
    from flowbench.locks import locked

    name = load_suite(suite).suite.name
    with locked(output / f".suite-{name}", f"suite '{name}' in '{output}'", beside=True):
        outcomes = _carried_out(cells, where, plugins, retry_failed)
    display.show(cells, _again(suite, plugin, output))
    if outcomes and not any(outcome.record for outcome in outcomes):
        raise RunError(f"every run failed; the first: {outcomes[0].failure}")


@app.command()
def show(
    suite: SuiteArgument,
    plugin: PluginOption = [],  # noqa: B006
    output: PlaceOption = OUTPUT,
) -> None:
    """Show which runs of a suite are done, running, interrupted, failed, missing or not applicable."""
    from flowbench.cli.display import suites as display

    cells, _ = _planned(suite, output, DEVICE, plugin)
    display.show(cells, _again(suite, plugin, output))


def compare(
    algorithms: Annotated[list[str], typer.Argument(metavar="ALGORITHM...", help="Two or more algorithms.")],
    rewards: Annotated[str, typer.Option(help="Rewards to train on, with commas between them.")] = REWARD,
    seeds: Annotated[int, typer.Option(min=1, max=MOST_SEEDS, help="Seeds of each algorithm on each reward.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="The first of the seeds.")] = 0,
    model: ModelOption = MODEL,
    images: Annotated[int | None, typer.Option(min=1, help="Budget of each run; default: the model's.")] = None,
    prompts: PromptsOption = None,
    split: Annotated[str, typer.Option(help="Prompt split to compare on.")] = "test",
    settings: SettingsOption = [],  # noqa: B006
    executor: ExecutorOption = "local",
    jobs: JobsOption = None,
    cores: CoresOption = 1,
    gpus: GpusOption = None,
    slurm: SlurmOption = [],  # noqa: B006
    device: DeviceOption = DEVICE,
    plugin: PluginOption = [],  # noqa: B006
    output: OutputOption = OUTPUT,
    retry_failed: RetryOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train algorithms on the same rewards and seeds, and say which differences hold."""
    from flowbench.cli.display import suites as display
    from flowbench.registry import load_plugin_file
    from flowbench.settings import parse_assignments

    for file in plugin:
        load_plugin_file(file)
    given = parse_assignments(settings)

    from flowbench.experiments.comparison import check_split, comparisons
    from flowbench.experiments.comparison import plan as plan_comparison

    names = [name.strip() for name in rewards.split(",") if name.strip()]
    numbers = range(first_seed, first_seed + seeds)
    if numbers[-1] > LARGEST_SEED:
        raise UsageError(f"--first-seed {first_seed} leaves no room for {seeds} seeds; the largest is {LARGEST_SEED}")
    cells = plan_comparison(
        *(algorithms, names, numbers, model, images, given),
        device=device,
        output=output,
        plugins=plugin,
        prompts=prompts,
    )
    check_split(cells, split)
    if dry_run:
        display.plan(cells)
        return
    where = _executor(executor, jobs, cores, gpus, slurm, device, output)
    outcomes = _carried_out(cells, where, plugin, retry_failed)
    display.comparisons(comparisons(cells, outcomes, split), cells)


def _planned(suite: str, output: Path, device: str, plugin: Sequence[Path]) -> tuple[list[Cell], list[Path]]:
    """A suite's cells, and all plug-in files that its runs need."""
    from flowbench.experiments.suite import load_suite
    from flowbench.experiments.suite import plan as plan_suite
    from flowbench.registry import load_plugin_file

    loaded = load_suite(suite)
    more = [file for file in plugin if file.resolve() not in loaded.plugins]
    for file in (*loaded.plugins, *more):
        load_plugin_file(file)
    return plan_suite(loaded, output, device, more), [*loaded.plugins, *more]


def _executor(
    name: str, jobs: int | None, cores: int, gpus: int | None, slurm: Sequence[str], device: str, output: Path
) -> Executor:
    from flowbench.experiments.executors import default_gpus, make_executor
    from flowbench.models.devices import pick_device

    if name == "local":
        pick_device(device)  # now, and not as the failure of every run
    options = {}
    for text in slurm:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--slurm {text!r} has no '='; write --slurm partition=gpu")
        options[key.strip()] = value.strip()
    each = default_gpus(name, device) if gpus is None else gpus
    return make_executor(name, jobs, cores, each, logs=output / "slurm", options=options)


def _carried_out(
    cells: Sequence[Cell], executor: Executor, plugins: Sequence[Path], retry_failed: bool
) -> list[Outcome]:
    from flowbench.cli.display.studies import StudyProgress
    from flowbench.experiments.study import run_jobs
    from flowbench.experiments.suite import all_jobs

    with StudyProgress() as progress:
        listener = progress.listener()
        return run_jobs(all_jobs(cells), listener, plugins=plugins, executor=executor, retry_failed=retry_failed)


def _again(suite: str, plugins: Sequence[Path], output: Path) -> str:
    """The command that makes what is missing."""
    import shlex

    words = ["flowbench", "suite", "run", suite, *(part for file in plugins for part in ("--plugin", str(file)))]
    return shlex.join([*words, *(["--output", str(output)] if output != OUTPUT else [])])
