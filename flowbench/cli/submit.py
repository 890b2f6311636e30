"""`flowbench submit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowbench.cli.options import PluginOption
from flowbench.errors import RunError, UsageError
from flowbench.experiments.defaults import RESULTS


def submit(
    places: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="A suite's folder, or run folders.")],
    to: Annotated[Path, typer.Option(help="Folder of published results.")] = RESULTS,
    check: Annotated[bool, typer.Option("--check", help="Check, and write nothing.")] = False,
    ablation: Annotated[bool, typer.Option("--ablation", help="Take runs of 'flowbench ablate'.")] = False,
    rehearsal: Annotated[
        bool, typer.Option("--rehearsal", help="Take runs of suite 'rehearsal', to try the way.")
    ] = False,
    plugin: PluginOption = [],  # noqa: B006
) -> None:
    """Check runs as a contribution to the published results, and add them as compact records; nothing is replaced."""
    from flowbench.experiments.submission import submit as hand_in
    from flowbench.registry import load_plugin_file

    if ablation and rehearsal:
        raise UsageError("--ablation and --rehearsal ask for runs of two kinds; use one of them at a time")
    for file in plugin:
        load_plugin_file(file)
    result = hand_in(places, to, rehearsal=rehearsal, ablation=ablation, write=not check)
    for fault in result.faults:
        typer.echo(fault)
    if result.faults:
        n = len(result.faults)
        raise RunError(f"{n} check{'s' * (n > 1)} failed for {len(result.records)} records; nothing was published")
    seen = f"{len(result.records)} records passed all checks"
    typer.echo(seen if check else f"{seen}; {len(result.written)} files are new below {to}")
    if result.written and not rehearsal:
        typer.echo("next: flowbench leaderboard --write")
