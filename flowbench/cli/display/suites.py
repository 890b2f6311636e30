"""What the command line prints of suites and comparisons, with rich."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flowbench.cli.display.console import console
from flowbench.cli.display.studies import duration
from flowbench.cli.display.studies import plan as plan_jobs
from flowbench.escape import terminal as escape

if TYPE_CHECKING:
    from flowbench.evaluation.statistics import Interval
    from flowbench.experiments.comparison import Comparison
    from flowbench.experiments.suite import Cell

STATES = ("done", "running", "interrupted", "failed", "missing")


def plan(cells: Sequence[Cell]) -> None:
    """The runs of a suite and what they cost."""
    from flowbench.experiments.suite import all_jobs, seconds_left

    plan_jobs(all_jobs(cells))
    later = sum(cell.later for cell in cells)
    if later:
        images = sum(cell.later * cell.workload.images for cell in cells)
        console.print(f"and {later} results of studies, with {images} training images")
    seconds = seconds_left(cells)
    if seconds is None:
        console.print("time: not known before a run has ended")
    else:
        console.print(f"time: {duration(seconds)} one run after another, as those that have ended", highlight=False)
    _not_applicable(cells)


def show(cells: Sequence[Cell], command: str) -> None:
    """What is done and what is missing of a suite, a table per workload; command: what makes the rest."""
    total: Counter[str] = Counter(dict.fromkeys(STATES, 0))
    for workload, group in groupby(cells, lambda c: c.workload):
        title = (
            f"{workload.name}: {workload.model} on {workload.reward}, {workload.images} images, hash {workload.hash}"
        )
        view = _table(title)
        view.add_column("algorithm", overflow="fold")
        for heading in ("runs", *STATES):
            view.add_column(heading, justify="right", no_wrap=True)
        for cell in group:
            counts = cell.counts()
            numbers = ["n/a", *[""] * len(STATES)] if cell.not_applicable else [cell.runs, *counts.values()]
            view.add_row(escape(cell.algorithm), *(str(n or "-") if n != "" else "" for n in numbers))
            total.update(counts)
        console.print(view)
    _not_applicable(cells)
    for line in (line for cell in cells for line in cell.failures()):
        console.print(f"[red]failed[/]: {escape(line)}", soft_wrap=True, highlight=False)
    console.print(", ".join(f"{n} {state}" for state, n in total.items()), highlight=False)
    if total["interrupted"] or total["missing"]:
        console.print(f"for the rest: {escape(command)}", soft_wrap=True, highlight=False)
    if total["failed"]:
        console.print(f"to make failed ones again: {escape(command)} --retry-failed", soft_wrap=True, highlight=False)


def comparisons(found: Sequence[Comparison], cells: Sequence[Cell]) -> None:
    """Gains, who shares the first place, and all differences, for each workload and metric."""
    for comparison in found:
        _comparison(comparison)
    _not_applicable(cells)
    for line in dict.fromkeys(line for comparison in found for line in comparison.failures):
        console.print(f"[red]failed[/]: {escape(line)}", soft_wrap=True, highlight=False)
    console.print(
        "gain: tuned minus base with its 95 % interval over seeds and prompts; first: not separable from the best; "
        "rank: best and worst possible; p: after Holm's correction for all pairs (docs/statistics.md)",
        highlight=False,
    )


def _comparison(comparison: Comparison) -> None:
    ranking, workload = comparison.ranking, comparison.workload
    trained = ", trained on" if comparison.trained else ""
    where = f"{workload.model} on {workload.reward}, {workload.images} images"
    view = _table(f"{where}: {comparison.metric} on {comparison.split}{trained}")
    view.add_column("algorithm", overflow="fold")
    for heading in ("seeds", "gain", "first", "rank"):
        view.add_column(heading, justify="right", no_wrap=True)
    for s in ranking.standings:
        seeds = f"{s.gain.seeds}" + (f" (+{s.gain.failed} failed)" if s.gain.failed else "")
        low, high = s.rank
        rank = str(low) if low == high else f"{low}-{high}"
        view.add_row(escape(s.algorithm), seeds, _interval(s.gain), "yes" if s.shares_first else "", rank)
    for name in ranking.unfinished:
        view.add_row(escape(name), "0", "no finished run", "", "")
    console.print(view)
    pairs = _table("")
    pairs.add_column("difference", overflow="fold")
    for heading in ("", "p"):
        pairs.add_column(heading, justify="right", no_wrap=True)
    for p in ranking.pairs:
        pairs.add_row(escape(f"{p.one} - {p.other}"), _interval(p.difference), f"{p.p_holm:.3f}")
    if ranking.pairs:
        console.print(pairs)


def _interval(found: Interval) -> str:
    """ "+0.083 [+0.071, +0.094]"; one seed has no interval."""
    text = f"{found.value:+.3f}"
    return text if found.low is None else escape(f"{text} [{found.low:+.3f}, {found.high:+.3f}]")


def _not_applicable(cells: Sequence[Cell]) -> None:
    for cell in (cell for cell in cells if cell.not_applicable):
        line = f"not applicable: {cell.algorithm} on {cell.workload.name}; {cell.not_applicable}"
        console.print(escape(line), soft_wrap=True, highlight=False)


def _table(title: str) -> Table:
    """An empty table below its title, which is as wide as the terminal and not as the table."""
    if title:
        console.print(escape(title), style="italic", highlight=False)
    return Table(box=SIMPLE_HEAD, pad_edge=False)
