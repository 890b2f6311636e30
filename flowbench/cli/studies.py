"""`flowbench ablate` and `flowbench check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowbench.cli.options import MOST, MOST_SEEDS, DeviceOption, ModelOption, OutputOption, PluginOption, new_file
from flowbench.errors import UsageError, shortened
from flowbench.experiments.defaults import DEVICE, MODEL, OUTPUT, REWARD


def ablate(
    algorithm: Annotated[str, typer.Argument(help="Algorithm; see 'flowbench list algorithms'.")],
    reward: Annotated[str, typer.Option(help="Reward to train on.")] = REWARD,
    model: ModelOption = MODEL,
    seeds: Annotated[int, typer.Option(min=1, max=MOST_SEEDS, help="Seeds per variant.")] = 3,
    images: Annotated[int | None, typer.Option(min=1, help="Budget of each run.")] = None,
    device: DeviceOption = DEVICE,
    settings: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override for every variant.")] = [],  # noqa: B006
    plugin: PluginOption = [],  # noqa: B006
    output: OutputOption = OUTPUT,
    jobs: Annotated[int, typer.Option(min=1, max=MOST, help="Runs at a time, each in a process of its own.")] = 1,
    split: Annotated[str, typer.Option(help="Prompt split to compare on.")] = "test",
    format_: Annotated[str, typer.Option("--format", help="terminal, markdown or csv.")] = "terminal",
    table: Annotated[
        Path | None, typer.Option(callback=new_file, help="Write the table there instead of to the terminal.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(callback=new_file, help="PNG of the curves; default: beside the runs.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and their state.")] = False,
) -> None:
    """Compare an algorithm's default with its declared ablations over seeds; finished runs are not repeated."""
    from flowbench.cli.display import studies as display
    from flowbench.config import resolve_config
    from flowbench.registry import load_plugin_file
    from flowbench.settings import parse_assignments, with_budget

    if format_ not in ("terminal", "markdown", "csv"):
        raise UsageError(f"unknown format '{format_}'; use terminal, markdown or csv")
    if table and format_ == "terminal":
        raise UsageError("--table writes a file; add --format markdown or --format csv")
    for file in plugin:
        load_plugin_file(file)
    overrides = with_budget(parse_assignments(settings), images)
    resolve_config(algorithm, reward, model, overrides=overrides)  # a misspelling is answered before torch is imported

    from flowbench.experiments.ablation import all_jobs, plan, rows, to_csv, to_markdown
    from flowbench.experiments.study import run_jobs

    where = {"reward": reward, "model": model, "device": device, "output": output, "plugins": plugin}
    variants = plan(algorithm, overrides, seeds, split, **where)
    if dry_run:
        display.plan(all_jobs(variants))
        return
    from flowbench.files import write_atomically
    from flowbench.reporting.plots import ablation_curves
    from flowbench.reporting.style import drawing

    with display.StudyProgress() as progress:
        outcomes = run_jobs(all_jobs(variants), progress.listener(), jobs, plugin)
    result = rows(variants, outcomes, split)
    if format_ == "terminal":
        display.ablation(result)
    else:
        text = to_markdown(result) if format_ == "markdown" else to_csv(result)
        if table:
            write_atomically(table, text)
        else:
            typer.echo(text, nl=False)
    path = plot or variants[0].jobs[0].folder.parent / "ablation.png"
    with drawing("of the study"):
        ablation_curves(path, {row.variant: row.curves for row in result}, f"{algorithm} on {reward}")
        typer.echo(path, err=True)


def check(
    names: Annotated[list[str], typer.Argument(help="Algorithms and rewards; default: those of --plugin.")] = [],  # noqa: B006
    everything: Annotated[bool, typer.Option("--all", help="All algorithms and rewards.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Model of the runs; default: gaussian, and mini-sd3 for rewards of images.")
    ] = None,
    plugin: PluginOption = [],  # noqa: B006
) -> None:
    """Try on an algorithm or reward what must hold of every one; exit code 1 if a claim fails."""
    from flowbench.cli.display import studies as display
    from flowbench.conformance import check as try_claims
    from flowbench.registry import algorithms, load_plugin_file, rewards

    if everything and names:
        raise UsageError(f"--all stands for every name, and {shortened(names[0])} is given too; leave one out")
    before = {*algorithms.loaded, *rewards.loaded}
    for file in plugin:
        load_plugin_file(file)
    added = sorted({*algorithms.loaded, *rewards.loaded} - before)
    chosen = [*algorithms.names(), *rewards.names()] if everything else names or added
    if not chosen:
        raise UsageError("name an algorithm or a reward, or use --all")
    if not display.checklist(try_claims(chosen, model)):
        raise typer.Exit(1)
