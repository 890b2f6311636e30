"""`flowbench leaderboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowbench.errors import RunError, UsageError, did_you_mean
from flowbench.experiments.defaults import LEADERBOARD, OUTPUT

FORMATS = {"terminal": ".txt", "markdown": ".md", "csv": ".csv", "latex": ".tex"}


def leaderboard(
    places: Annotated[list[Path], typer.Argument(help="Folders or records; default: runs.")] = [OUTPUT],  # noqa: B006
    split: Annotated[str, typer.Option(help="Prompt split to compare on.")] = "test",
    format_: Annotated[
        str | None,
        typer.Option("--format", help="terminal, markdown, csv or latex; default: as the output ends, or terminal."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write there instead of to the terminal.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Columns: metrics, rank, iqm, improvement, difference, p, ..."),
    ] = None,
    transpose: Annotated[bool, typer.Option("--transpose", help="Methods side by side; terminal only.")] = False,
    by: Annotated[
        str | None, typer.Option(metavar="METRIC", help="Order and ranks; default: truth, else the reward trained on.")
    ] = None,
    over: Annotated[
        str, typer.Option(help="What intervals speak of: 'like' for prompts like these, 'these' for these prompts.")
    ] = "like",
    target: Annotated[
        str | None, typer.Option(metavar="METRIC=VALUE", help="Show images and seconds until dev scores reach it.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fail where a leaderboard's pages and its published records differ.")
    ] = False,
    since: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="With --check: what was published then must still be there.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Make a leaderboard's pages from its published records.")
    ] = False,
) -> None:
    """Compare runs: means with intervals, ranks and who shares the first place, generated from their records.

    With --check or --write PLACE is the folder of a leaderboard, by default `leaderboard`; tables are not printed.
    """
    if check or write:
        if len(places) > 1 or (check and write):
            raise UsageError("--check or --write takes one folder of a leaderboard; use one of them at a time")
        _pages(LEADERBOARD if places == [OUTPUT] else places[0], write, since)
        return
    if since is not None:
        raise UsageError("--since says what --check compares with; add --check")
    kind = _format(format_, output)
    if over not in ("like", "these"):
        raise UsageError(f"unknown value '{over}' of --over; use like or these")
    if columns is not None and kind == "csv":
        raise UsageError("--columns does not apply to csv, which has every column; drop it or use --format markdown")
    if transpose and kind != "terminal":
        raise UsageError(f"--transpose applies to the terminal and not to {kind}; drop it or use --format terminal")
    keys = [key.strip() for key in columns.split(",") if key.strip()] if columns is not None else None
    goal = _target(target) if target is not None else None

    from flowbench.record import read_records

    found = read_records(places)
    if found.faults and not found.records:
        raise UsageError(found.faults[0])
    from flowbench.evaluation.statistics import LIKE, THESE
    from flowbench.reporting.columns import check_keys
    from flowbench.reporting.leaderboard import board
    from flowbench.reporting.targets import Target

    result = board(found.records, split, LIKE if over == "like" else THESE, by, Target(*goal) if goal else None)
    check_keys(result.tables, keys or ())
    if kind == "terminal":
        from flowbench.cli.display.leaderboard import as_text, show

        text = as_text(result, keys, transpose) if output else show(result, keys, transpose)
    else:
        from flowbench.reporting.documents import to_csv, to_latex, to_markdown

        text = to_csv(result) if kind == "csv" else (to_latex if kind == "latex" else to_markdown)(result, keys)
    _hand_out(text, output)
    _name(found.faults)


def _pages(folder: Path, write: bool, since: str | None) -> None:
    """Make the pages of published results, or say where they differ from the records."""
    if not folder.is_dir():
        raise UsageError(f"'{folder}' does not exist; name the folder of a leaderboard, in a checkout 'leaderboard'")
    from flowbench.experiments.submission import check_published
    from flowbench.reporting.results import pages

    faults = check_published(folder / pages.RESULTS, since)
    if not faults:
        made = pages.pages(folder, folder.parent / pages.README)
        if write:
            for path in pages.write(made, folder):
                typer.echo(path)
            return
        faults = pages.stale(made, folder)
    for fault in faults:
        typer.echo(fault)
    if faults:
        raise RunError(f"{len(faults)} faults in '{folder}': its pages and its records do not agree")
    typer.echo(f"{folder}: pages and records agree")


def _hand_out(text: str, output: Path | None) -> None:
    from flowbench.files import write_atomically

    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        write_atomically(output, text)
    except OSError as error:
        raise UsageError(f"--output '{output}' cannot be written: {error.strerror}") from error


def _name(faults: tuple[str, ...]) -> None:
    """Name what was left out, on stderr."""
    from flowbench.reporting.escape import plain

    for fault in faults:
        typer.echo(f"flowbench: left out: {plain(fault)}", err=True)


def _format(given: str | None, output: Path | None) -> str:
    if given is None:
        endings = {ending: name for name, ending in FORMATS.items()}
        return endings.get(output.suffix.lower(), "terminal") if output else "terminal"
    if given not in FORMATS:
        raise UsageError(f"unknown format '{given}'{did_you_mean(given, FORMATS)}")
    return given


def _target(text: str) -> tuple[str, float]:
    """ "oracle_exact=0.6" as metric and value."""
    import math

    metric, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not metric.strip() or not equals or not math.isfinite(number):
        raise UsageError(f"--target '{text}' is not of the form METRIC=VALUE, such as oracle_exact=0.6")
    return metric.strip(), number
