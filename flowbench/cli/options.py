"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[str, typer.Option(help="Model preset, or a preset's YAML file.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
PluginOption = Annotated[list[Path], typer.Option("--plugin", help="Python file that registers algorithms or rewards.")]
OutputOption = Annotated[Path, typer.Option(help="Folder of run folders.")]
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
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")]
