"""What the command line prints of studies and of conformance, with rich."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from flowbench.cli.display.console import console
from flowbench.cli.display.progress import LiveProgress, RunProgress
from flowbench.escape import terminal as escape

if TYPE_CHECKING:
    from flowbench.conformance import Finding
    from flowbench.experiments.ablation import Row
    from flowbench.experiments.run import Listener
    from flowbench.experiments.study import Job, Outcome, StudyListener


class StudyProgress(LiveProgress):
    """Runs done of a study, rate, time left and failures, and the progress of those at work.

    On stderr, since the table may go to a file.
    """

    def __init__(self) -> None:
        super().__init__(Console(stderr=True))
        self.begun, self.ended, self.failed = time.monotonic(), 0, 0

    def listener(self) -> StudyListener:
        """The callbacks for `study.run_jobs`."""
        from flowbench.experiments.study import StudyListener

        return StudyListener(self._start, self._training, self._outcome)

    def _start(self, job: Job, done: int, total: int) -> AbstractContextManager[Listener]:
        self.show("runs", done, total, job.label)
        for name in self.tasks.keys() - {"runs"}:
            self.progress.remove_task(self.tasks.pop(name))
        inner = RunProgress(job.config)
        inner.progress, inner.tasks = self.progress, self.tasks
        return nullcontext(inner.listener())

    def _training(self, job: Job, done: int, total: int) -> None:
        self.show(job.label, done, total)

    def _outcome(self, outcome: Outcome, done: int, total: int) -> None:
        self.ended += 1
        self.failed += outcome.failure is not None
        pace = self._pace(total - done)
        self.show("runs", done, total, pace)
        if outcome.job.label in self.tasks:
            self.progress.remove_task(self.tasks.pop(outcome.job.label))
        state = f"[red]failed[/]: {escape(outcome.failure)}" if outcome.failure else "done"
        line = f"run {done} of {total}, {escape(outcome.job.label)}: {state}; {pace}"
        self.progress.console.print(line, soft_wrap=True, highlight=False)

    def _pace(self, left: int) -> str:
        """Runs per hour since the start, the time left, and how many failed."""
        each = (time.monotonic() - self.begun) / self.ended
        parts = [f"{3600 / max(each, 1e-3):.3g} runs/h", f"{duration(each * left)} left"]
        return ", ".join(parts + ([f"{self.failed} failed"] if self.failed else []))


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _table(title: str, *headings: str) -> Table:
    view = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        view.add_column(escape(heading), overflow="fold")
    return view


def plan(jobs: Sequence[Job]) -> None:
    """The runs of a study and what it costs."""
    view = _table("", "run", "state", "images", "command")
    for job in jobs:
        state = "done" if job.done else "iteration {} of {}".format(*job.iterations)
        view.add_row(escape(job.label), state, str(job.config.training.images), escape(job.command))
    console.print(view)
    left = [job.config.training.images for job in jobs if not job.done]
    console.print(f"cost: {sum(left)} training images in {len(left)} runs, and their evaluation")


def ablation(table: Sequence[Row]) -> None:
    """An ablation study in the terminal."""
    from flowbench.experiments.ablation import cells, failures, headings, legend

    columns = headings(table)
    view = _table("", *columns)
    view.columns[0].no_wrap = True
    wide = console.width >= 20 + 24 * len(columns)
    for row in table:
        texts = cells(row, columns)
        view.add_row(*map(escape, texts if wide else [re.sub(r" \[[^]]*\]", "", text) for text in texts]))
    console.print(view)
    if not wide:
        console.print("intervals: widen the terminal, or --format markdown or csv", highlight=False)
    console.print(escape(legend(table)), highlight=False)
    for line in failures(table):
        console.print(f"[red]{escape(line)}[/]", soft_wrap=True)


def checklist(findings: Iterable[Finding]) -> bool:
    """Each plug-in's claims as they are tried; returns whether none failed."""
    from flowbench.conformance import Status

    colors = {Status.PASS: "green", Status.FAIL: "red", Status.SKIPPED: "yellow"}
    statuses: list[Status] = []
    for (kind, plugin), group in groupby(findings, lambda f: (f.kind, f.plugin)):
        view = _table(f"{kind} {plugin}", "claim", "result", "")
        view.columns[0].no_wrap = True
        with Live(view, console=console, vertical_overflow="visible"):
            for finding in group:
                status = finding.verdict.status
                statuses.append(status)
                view.add_row(escape(finding.claim), f"[{colors[status]}]{status}[/]", escape(finding.verdict.reason))
        if not console.is_terminal:
            console.print()
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in Status if status in statuses)
    console.print(counts or "nothing to check", highlight=False)
    return Status.FAIL not in statuses
