"""What the command line prints of a probe, with rich."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flowbench.cli.display.console import console
from flowbench.cli.display.progress import LiveProgress
from flowbench.escape import terminal as escape

if TYPE_CHECKING:
    from flowbench.experiments.probe import ProbeListener, ProbeReport

WIDE = 150  # columns that the table with its intervals takes


class ProbeProgress(LiveProgress):
    """How far the true gradient and each algorithm are; on stderr, since the table may go to a file."""

    def __init__(self) -> None:
        super().__init__(Console(stderr=True))

    def listener(self) -> ProbeListener:
        """The callback for `experiments.probe.probe`."""
        from flowbench.experiments.probe import ProbeListener

        return ProbeListener(self.show)


def table(report: ProbeReport) -> None:
    """A probe in the terminal."""
    from flowbench.reporting.probe import HEADINGS, cells, legend

    wide = console.width >= WIDE
    view = Table(title="", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        view.add_column(heading, overflow="fold", no_wrap=heading == "algorithm")
    for row in report.rows:
        texts = cells(row)
        if row.failure:
            texts = (*texts[:2], "failed", *texts[3:])
        view.add_row(*map(escape, texts if wide else [re.sub(r" \[[^]]*\]", "", text) for text in texts]))
    console.print(view)
    if not wide:
        console.print("intervals: widen the terminal, or --format markdown", highlight=False)
    console.print(escape(legend(report)), highlight=False)
    for row in report.rows:
        if row.failure:
            console.print(f"[red]{escape(f'{row.algorithm}: {row.failure}')}[/]", soft_wrap=True)
