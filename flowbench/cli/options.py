"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowbench.errors import UsageError, shortened

LARGEST_SEED = 2**63 - 1  # what torch takes
MOST_SEEDS = 1000  # of one study
MOST = 1_000_000  # of whatever else is counted: more is a slip of the keyboard


def new_file(context: typer.Context, parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    """An option's file, which can be written. Raises UsageError for one that cannot, before anything is computed."""
    if value is not None and not context.resilient_parsing:
        from flowbench.outputs import check_file

        check_file(parameter.opts[0], value)
    return value


def new_folder(context: typer.Context, parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    """An option's folder, which can be written to. Raises UsageError for one that cannot, as `new_file` does."""
    if value is not None and not context.resilient_parsing:
        from flowbench.outputs import check_folder

        check_folder(parameter.opts[0], value)
    return value


def old_folder(context: typer.Context, parameter: typer.CallbackParam, value: Path) -> Path:
    """An option's folder, which is there if it is named. Raises UsageError for one that is not."""
    source = context.get_parameter_source(parameter.name or "")
    named = source is not None and source.name != "DEFAULT"
    if named and not context.resilient_parsing and not value.is_dir():
        raise UsageError(f"{parameter.opts[0]} {shortened(str(value))} is no folder; name one that is there")
    return value


def say(line: object) -> None:
    """Print a path, or another line with foreign text in it."""
    from flowbench.escape import plain

    typer.echo(plain(str(line)))


ModelOption = Annotated[str, typer.Option(help="Model preset, or a preset's YAML file.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
PluginOption = Annotated[list[Path], typer.Option("--plugin", help="Python file that registers algorithms or rewards.")]
OutputOption = Annotated[Path, typer.Option(callback=new_folder, help="Folder of run folders.")]
PlaceOption = Annotated[Path, typer.Option("--output", help="Folder of run folders.")]  # of commands that only look
PromptsOption = Annotated[str | None, typer.Option(help="Prompt set: a name, a folder with a file per split, a file.")]
SettingsOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override, for example training.learning_rate=1e-4.")
]
TrackOption = Annotated[
    list[str],
    typer.Option("--track", metavar="NAME", help="Experiment tracker: tensorboard, wandb, trackio, ...; repeatable."),
]
MemoryLimitOption = Annotated[
    str | None, typer.Option(metavar="24GiB", help="Divide the work so that every phase fits; results stay the same.")
]
KeepImagesOption = Annotated[
    bool, typer.Option("--keep-images", help="Keep the evaluation's images as PNG, with a table of their scores.")
]
TflopsOption = Annotated[float | None, typer.Option(min=0.001, help="Throughput that times are computed with.")]
RandomInitOption = Annotated[
    bool, typer.Option("--random-init", help="The model's real configuration with random weights; to measure only.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", callback=new_file, help="Write the numbers to this file.")]
