"""`flowbench testbed ...`: build the embedded models, draw the world, print a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowbench.cli.options import LARGEST_SEED, DeviceOption, new_file, new_folder, say
from flowbench.errors import UsageError, did_you_mean
from flowbench.experiments.defaults import DEVICE

app = typer.Typer(no_args_is_help=True, help="The embedded world of shapes: build, show, path.", rich_markup_mode=None)


@app.command("build")
def build(
    output: Annotated[
        Path | None, typer.Option(callback=new_folder, help="Folder for the weights; default: inside the package.")
    ] = None,
    work: Annotated[
        Path, typer.Option(callback=new_folder, help="Folder of checkpoints; a build continues from them.")
    ] = Path(".cache/testbed"),
    only: Annotated[list[str], typer.Option("--only", help="vae, clip, text, transformer, rewards; default all.")] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED)] = 0,
    device: DeviceOption = DEVICE,
) -> None:
    """Train the embedded models from nothing.

    mini-sd3 and mini-clip take about two hours on two slow cores, and the preference models come on top; a GPU takes
    minutes.
    """
    from flowbench.builders.stages import chosen_stages

    chosen_stages(only)  # a misspelling is answered before torch is imported
    from flowbench.builders.pipeline import build as build_
    from flowbench.cli.display.progress import BuildProgress

    with BuildProgress() as progress:
        folder = build_(output, work, only, seed, device, progress)
    say(folder)


@app.command("show")
def show(
    output: Annotated[Path, typer.Option(callback=new_file, help="PNG to write.")] = Path("testbed.png"),
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED)] = 0,
) -> None:
    """Draw scenes of the world with their captions, and what the base model makes of the same captions."""
    from flowbench.experiments.sampling import show_testbed

    say(show_testbed(output, seed))


@app.command("path")
def path(
    model: Annotated[str, typer.Argument(help="mini-sd3, mini-clip, mini-hpsv2, mini-imagereward, ...")],
) -> None:
    """Print the folder of an embedded model; plain diffusers, open_clip or transformers loads it."""
    from flowbench.testbeds.shapes.weights import embedded_models, weights_folder

    if model not in embedded_models():
        raise UsageError(f"unknown testbed model '{model}'{did_you_mean(model, embedded_models())}")
    say(weights_folder() / model)
