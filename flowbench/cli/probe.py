"""`flowbench probe`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flowbench.cli.options import LARGEST_SEED, MOST, DeviceOption, PluginOption, SettingsOption, new_file
from flowbench.errors import UsageError, shortened
from flowbench.experiments.defaults import DEVICE, MODEL, REWARD


def probe(
    names: Annotated[list[str], typer.Argument(metavar="ALGORITHM...", help="Algorithms.")] = [],  # noqa: B006
    everything: Annotated[bool, typer.Option("--all", help="All algorithms.")] = False,
    reward: Annotated[str | None, typer.Option(help=f"A differentiable reward; default {REWARD}.")] = None,
    model: Annotated[str | None, typer.Option(help=f"Model preset or preset file; default {MODEL}.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Start from this run's weights.")] = None,
    images: Annotated[int, typer.Option(min=16, max=MOST, help="Images of the true gradient.")] = 8192,
    batches: Annotated[int, typer.Option(min=3, max=MOST, help="Batches of each algorithm.")] = 12,
    warmup: Annotated[
        int, typer.Option(min=0, max=MOST, help="Iterations before, for the algorithm's own networks alone.")
    ] = 0,
    sampler: Annotated[str, typer.Option(help="True gradient through the 'evaluation' or the 'own' sampler.")] = (
        "evaluation"
    ),
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of batches and true gradient.")] = 0,
    device: DeviceOption = DEVICE,
    settings: SettingsOption = [],  # noqa: B006
    plugin: PluginOption = [],  # noqa: B006
    cache: Annotated[Path | None, typer.Option(help="Folder of true gradients; default: in flowbench's home.")] = None,
    output: Annotated[Path | None, typer.Option(callback=new_file, help="Write the results to this JSON file.")] = None,
    format_: Annotated[str, typer.Option("--format", help="terminal or markdown.")] = "terminal",
    plot: Annotated[Path | None, typer.Option(callback=new_file, help="Draw the results into this PNG.")] = None,
) -> None:
    """Compare one update of each algorithm with the true gradient of the mean reward; nothing is trained."""
    from flowbench.registry import algorithms, load_plugin_file
    from flowbench.settings import parse_assignments

    _one_of("--format", format_, ("terminal", "markdown"))
    _one_of("--sampler", sampler, ("evaluation", "own"))
    if everything and names:
        raise UsageError(f"--all stands for every name, and {shortened(names[0])} is given too; leave one out")
    for file in plugin:
        load_plugin_file(file)
    chosen = algorithms.names() if everything else names
    if not chosen:
        raise UsageError("name an algorithm, or use --all")
    given: dict[str, Any] = parse_assignments(settings)

    from flowbench.experiments.probe import ProbePlan, probe_configs
    from flowbench.experiments.probe import probe as measure

    configs = probe_configs(chosen, reward, model, run, seed, device, given)
    plan = ProbePlan(images, batches, warmup, "own" if sampler == "own" else "evaluation", cache)

    from flowbench.cli.display import probe as display
    from flowbench.reporting.probe import picture, to_markdown

    with display.ProbeProgress() as progress:
        command = shlex.join(["flowbench", *sys.argv[1:]])
        report = measure(configs, plan, run, command, progress.listener(), output)
    if format_ == "markdown":
        typer.echo(to_markdown(report), nl=False)
    else:
        display.table(report)
    if plot:
        picture(plot, report)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"unknown value '{value}' of {option}; use {' or '.join(known)}")
