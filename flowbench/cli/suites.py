"""`flowbench suite` and `flowbench compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowbench.cli.executors import (
    CoresOption,
    ExecutorOption,
    GpusOption,
    JobsOption,
    SlurmOption,
    chosen_executor,
)
from flowbench.cli.options import (
    LARGEST_SEED,
    MOST_SEEDS,
    DeviceOption,
    ModelOption,
    OutputOption,
    PlaceOption,
    PluginOption,
    PromptsOption,
    SettingsOption,
    new_folder,
)
from flowbench.errors import RunError, UsageError
from flowbench.experiments.defaults import DEVICE, MODEL, OUTPUT, REWARD, SEARCHES

if TYPE_CHECKING:
    from flowbench.experiments.executors import Executor
    from flowbench.experiments.study import Outcome
    from flowbench.experiments.suite import Cell, Loaded
    from flowbench.experiments.tuning.search import Places

app = typer.Typer(no_args_is_help=True, help="Workloads x algorithms x seeds from a file.", rich_markup_mode=None)

SuiteArgument = Annotated[str, typer.Argument(metavar="SUITE", help="A built-in suite's name, or a YAML file.")]
SEARCHES_HELP = "Folder of the logs and choices of studies."
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
    searches: Annotated[Path, typer.Option(callback=new_folder, help=SEARCHES_HELP)] = SEARCHES,
    retry_failed: RetryOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Make a suite's runs; the same command continues, finished and failed runs are kept."""
    from flowbench.cli.display import suites as display

    loaded, places = _loaded(suite, output, searches, device, plugin)
    cells = _planned(loaded, places)
    if dry_run:
        display.plan(cells)
        return
    where = chosen_executor(executor, jobs, cores, gpus, slurm, device, output)
    from flowbench.cli.display.studies import StudyProgress
    from flowbench.experiments import studies
    from flowbench.locks import locked

    name, outcomes = loaded.suite.name, []
    with locked(output / f".suite-{name}", f"suite '{name}' in '{output}'", beside=True):
        if seeded := [cell for cell in cells if not cell.studies]:
            outcomes += _carried_out(seeded, where, places.plugins, retry_failed)
        if len(seeded) < len(cells):
            with StudyProgress() as progress:
                outcomes += studies.carry_out(loaded, places, progress.listener(), where, retry_failed)
    display.show(_planned(loaded, places), _again(suite, plugin, output, searches))
    if outcomes and not any(outcome.record for outcome in outcomes):
        raise RunError(f"every run failed; the first: {outcomes[0].failure}")


@app.command()
def show(
    suite: SuiteArgument,
    plugin: PluginOption = [],  # noqa: B006
    output: PlaceOption = OUTPUT,
    searches: Annotated[Path, typer.Option(help=SEARCHES_HELP)] = SEARCHES,
) -> None:
    """Show which runs of a suite are done, running, interrupted, failed, missing or not applicable."""
    from flowbench.cli.display import suites as display

    loaded, places = _loaded(suite, output, searches, DEVICE, plugin)
    display.show(_planned(loaded, places), _again(suite, plugin, output, searches))


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
    where = chosen_executor(executor, jobs, cores, gpus, slurm, device, output)
    outcomes = _carried_out(cells, where, plugin, retry_failed)
    display.comparisons(comparisons(cells, outcomes, split), cells)


def _loaded(suite: str, output: Path, searches: Path, device: str, plugin: Sequence[Path]) -> tuple[Loaded, Places]:
    """A suite with its plug-ins loaded, and where its runs and the logs of its studies lie."""
    from flowbench.experiments.suite import load_suite
    from flowbench.experiments.tuning.search import Places
    from flowbench.registry import load_plugin_file

    loaded = load_suite(suite)
    files = (*loaded.plugins, *(file for file in plugin if file.resolve() not in loaded.plugins))
    for file in files:
        load_plugin_file(file)
    return loaded, Places(output, searches, device, files)


def _planned(loaded: Loaded, places: Places) -> list[Cell]:
    """A suite's cells."""
    from flowbench.experiments.studies import studied
    from flowbench.experiments.suite import none_twice
    from flowbench.experiments.suite import plan as plan_suite

    more = places.plugins[len(loaded.plugins) :]
    cells = plan_suite(loaded, places.runs, places.device, more)
    return none_twice([*cells, *(one.cell for one in studied(loaded, places))])


def _carried_out(
    cells: Sequence[Cell], executor: Executor, plugins: Sequence[Path], retry_failed: bool
) -> list[Outcome]:
    from flowbench.cli.display.studies import StudyProgress
    from flowbench.experiments.study import run_jobs
    from flowbench.experiments.suite import all_jobs

    with StudyProgress() as progress:
        listener = progress.listener()
        return run_jobs(all_jobs(cells), listener, plugins=plugins, executor=executor, retry_failed=retry_failed)


def _again(suite: str, plugins: Sequence[Path], output: Path, searches: Path) -> str:
    """The command that makes what is missing."""
    import shlex

    words = ["flowbench", "suite", "run", suite, *(part for file in plugins for part in ("--plugin", str(file)))]
    words += ["--output", str(output)] if output != OUTPUT else []
    return shlex.join([*words, *(["--searches", str(searches)] if searches != SEARCHES else [])])
