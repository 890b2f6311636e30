"""`flowbench page`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowbench.cli.options import new_file, old_folder, say
from flowbench.errors import UsageError
from flowbench.experiments.defaults import OUTPUT, SEARCHES


def page(
    places: Annotated[list[Path], typer.Argument(help="Folders or records; default: runs.")] = [OUTPUT],  # noqa: B006
    output: Annotated[Path, typer.Option(callback=new_file, help="The page to write.")] = Path("leaderboard.html"),
    split: Annotated[str, typer.Option(help="Prompt split to compare on.")] = "test",
    over: Annotated[
        str, typer.Option(help="What intervals speak of: 'like' for prompts like these, 'these' for these prompts.")
    ] = "like",
    samples: Annotated[
        list[Path] | None, typer.Option(help="Folder of runs with kept images, for the wall; may be repeated.")
    ] = None,
    searches: Annotated[
        Path, typer.Option(callback=old_folder, help="Folder of searches, whose choices are shown.")
    ] = SEARCHES,
    data: Annotated[bool, typer.Option("--data", help="Write the data beside the page, as .json and .csv.")] = False,
) -> None:
    """Make one page of results from records: tables, curves, pairs, samples; a single file that needs no network."""
    if over not in ("like", "these"):
        raise UsageError(f"unknown value '{over}' of --over; use like or these")

    from flowbench.record import read_records

    found = read_records(places)
    if found.faults and not found.records:
        raise UsageError(found.faults[0])
    from flowbench.escape import plain
    from flowbench.evaluation.statistics import LIKE, THESE
    from flowbench.reporting.chosen import find_chosen
    from flowbench.reporting.documents import to_csv
    from flowbench.reporting.page.about import spaces
    from flowbench.reporting.page.build import page_data, tables
    from flowbench.reporting.page.render import write
    from flowbench.reporting.page.samples import walls

    result = tables(found.records, split, LIKE if over == "like" else THESE)
    images = walls(samples, result) if samples else ()
    declared = spaces({r.algorithm for r in found.records})
    content = page_data(result, found.records, spaces=declared, walls=images, searches=find_chosen(searches))
    try:
        written = write(output, content, to_csv(result), beside=data)
    except OSError as error:
        raise UsageError(f"--output '{output}' cannot be written: {error.strerror}") from error
    for path in written:
        say(path)
    for fault in found.faults:
        typer.echo(f"flowbench: left out: {plain(fault)}", err=True)
