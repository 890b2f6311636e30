"""`flowbench rewards ...`: environments of rewards, parity of their backends, the reference server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowbench.cli.options import LARGEST_SEED, MOST, DeviceOption, new_file, say
from flowbench.experiments.defaults import DEVICE, MODEL

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Environments of reward models, parity with the packages that define them, a reward server.",
)

NamesArgument = Annotated[list[str], typer.Argument(metavar="NAME...", help="Rewards; see 'flowbench rewards list'.")]
PluginOption = Annotated[list[Path], typer.Option("--plugin", help="Python file that registers rewards.")]


def _load(plugins: list[Path]) -> None:
    from flowbench.registry import load_plugin_file

    for file in plugins:
        load_plugin_file(file)


@app.command("list")
def list_(plugin: PluginOption = []) -> None:  # noqa: B006 - typer wants the default itself
    """Rewards that live in an environment of their own: its state, size and licence."""
    from flowbench.cli.display import rewards as display
    from flowbench.scoring.workers.management import overview

    _load(plugin)
    display.environments(overview())


@app.command()
def install(names: NamesArgument, plugin: PluginOption = []) -> None:  # noqa: B006
    """Create the environments of rewards with pip; the main environment stays as it is."""
    from flowbench.cli.display import rewards as display
    from flowbench.scoring.workers.management import install as install_

    _load(plugin)
    with display.InstallProgress() as progress:
        installed = install_(names, progress)
    display.installed(installed)


@app.command()
def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Rewards.")] = [],  # noqa: B006
    everything: Annotated[bool, typer.Option("--all", help="Every environment there is.")] = False,
    plugin: PluginOption = [],  # noqa: B006
) -> None:
    """Delete the environments of rewards from the disk."""
    from flowbench.cli.display import rewards as display
    from flowbench.errors import UsageError
    from flowbench.scoring.workers.management import remove as remove_
    from flowbench.scoring.workers.management import remove_all

    _load(plugin)
    if bool(names) == everything:
        raise UsageError("name the rewards whose environments are to go, or give --all")
    display.removed(remove_all() if everything else remove_(names))


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Official checkpoint: .pt, .pth or .bin.")],
    output: Annotated[
        Path | None, typer.Argument(callback=new_file, help="Default: beside it, as .safetensors.")
    ] = None,
) -> None:
    """Rewrite a published pickle as safetensors; it is read without running any code that it may hold."""
    from flowbench.scoring.checkpoints import convert as convert_

    target = output or checkpoint.with_suffix(".safetensors")
    say(f"{target}: {convert_(checkpoint, target)} tensors")


@app.command()
def parity(
    name: Annotated[str, typer.Argument(help="hpsv2 or imagereward.")],
    weights: Annotated[Path | None, typer.Option(help="Checkpoint, or its folder; default: random weights.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of BERT's tokenizer; for imagereward.")] = None,
    version: Annotated[str | None, typer.Option(help="Version of the weights; for hpsv2.")] = None,
    reduced: Annotated[bool, typer.Option("--reduced", help="Random weights of small networks: seconds.")] = False,
    images: Annotated[int, typer.Option(min=2, max=MOST, help="Images per size.")] = 2,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of random weights and images.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    output: Annotated[Path | None, typer.Option(callback=new_file, help="Write the table there, in Markdown.")] = None,
) -> None:
    """Compare a reward's own backend with the package that defines it: scores, gradients, negative controls."""
    from flowbench.cli.display import rewards as display
    from flowbench.services.parity import compare, given_weights, verdict

    arguments = given_weights(name, weights, tokenizer, version, reduced)
    with display.ParityProgress() as say:
        findings = compare(name, arguments, reduced=reduced, images=images, seed=seed, device=device, say=say)
    display.parity(findings, output)
    verdict(name, findings)


@app.command()
def serve(
    name: Annotated[str, typer.Argument(help="Reward, or a sum such as clip:0.5+jpeg:0.5.")],
    model: Annotated[str, typer.Option(help="Model preset that configures the reward.")] = MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    device: DeviceOption = DEVICE,
    megabytes: Annotated[
        int, typer.Option("--max-megabytes", min=1, max=MOST, help="Largest request that is accepted.")
    ] = 256,
    megapixels: Annotated[
        int, typer.Option("--max-megapixels", min=1, max=MOST, help="Of all images of a request.")
    ] = 8,
    plugin: PluginOption = [],  # noqa: B006
) -> None:
    """Serve a reward over HTTP to whoever knows the token: FLOWBENCH_REWARD_TOKEN, or a random one that is printed."""
    _load(plugin)
    from flowbench.services.serving import Limits, serve_reward

    serve_reward(name, model, device, (host, port), Limits(body=megabytes * 2**20, pixels=megapixels * 2**20), say)
