"""`flowbench bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flowbench.cli.options import MOST, DeviceOption, JsonOption, PluginOption, RandomInitOption, SettingsOption
from flowbench.experiments.defaults import DEVICE, MODEL, REWARD


def bench(
    model: Annotated[str, typer.Option(help="Model preset or preset file.")] = MODEL,
    algorithm: Annotated[str, typer.Option(help="Whose update is timed.")] = "acflow",
    reward: Annotated[str, typer.Option(help="Reward that scores.")] = REWARD,
    images: Annotated[int, typer.Option(min=4, max=MOST, help="Images at a time, a multiple of 4.")] = 32,
    repeats: Annotated[
        int, typer.Option(min=1, max=MOST, help="Times that each part is timed; medians are shown.")
    ] = 5,
    compare: Annotated[str | None, typer.Option(help="Also time this: plain-diffusers.")] = None,
    random_init: RandomInitOption = False,
    json_: JsonOption = None,
    device: DeviceOption = DEVICE,
    settings: SettingsOption = [],  # noqa: B006
    plugin: PluginOption = [],  # noqa: B006
) -> None:
    """Time rollouts, updates and evaluation on this device, beside a matrix product of the same run."""
    from flowbench.cli.display.bench import BenchProgress, table
    from flowbench.experiments.bench import bench as measure
    from flowbench.experiments.bench import bench_config
    from flowbench.files import write_atomically
    from flowbench.record import RANDOM
    from flowbench.registry import load_plugin_file
    from flowbench.settings import parse_assignments

    for file in plugin:
        load_plugin_file(Path(file))
    name = model + RANDOM if random_init and not model.endswith(RANDOM) else model
    config = bench_config(name, algorithm, reward, device, images, repeats, parse_assignments(settings))
    with BenchProgress(repeats) as progress:
        report = measure(config, repeats, compare, progress.tick)
    if json_ is not None:
        write_atomically(json_, json.dumps(report.as_json(), indent=1) + "\n")
    table(report)
