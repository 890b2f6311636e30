"""What the command line prints of a bench, with rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flowbench.cli.display.console import console
from flowbench.cli.display.progress import LiveProgress
from flowbench.escape import terminal as escape

if TYPE_CHECKING:
    from flowbench.experiments.bench import BenchReport


class BenchProgress(LiveProgress):
    """How often everything was timed; on stderr, since the table may go to a file."""

    def __init__(self, repeats: int) -> None:
        super().__init__(Console(stderr=True))
        self.repeats = repeats

    def tick(self, done: int) -> None:
        """`done` rounds are timed."""
        self.show("bench", done, self.repeats)


def table(report: BenchReport) -> None:
    """A bench in the terminal."""
    title = f"{report.model}, {report.algorithm} on {report.reward}, {report.tuning}, {report.dtype}, {report.device}"
    view = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("part", "seconds", "per second", "TFLOP", "of matmul", "peak GiB"):
        view.add_column(heading, justify="left" if heading == "part" else "right", no_wrap=True)
    for s in report.speeds:
        view.add_row(
            s.part,
            f"{s.seconds:.3f}",
            f"{s.rate:.1f} {s.unit}",
            f"{s.tflop:.3g}",
            f"{s.matmul_share:.0%}",
            f"{s.peak_gib:.2f}",
        )
    console.print(view)
    notes = [
        f"{report.rollouts:.1f} rollouts/s with decoding and reward",
        f"matmul here {report.matmul_tflops:.3g} TFLOP/s",
        f"medians of {report.repeats} times, in turns, {report.images} images at a time",
    ]
    if report.over_plain is not None:
        notes.insert(1, f"rollout and decode {report.over_plain:.2f} times as fast as plain diffusers")
    if report.overlap is not None:
        o = report.overlap
        notes.append(
            f"decoding and scoring {o.portion} images beside the rollout of the next: {o.beside:.3f} s instead of "
            f"{o.in_turns:.3f} s, {o.speedup:.2f} times as fast"
        )
    console.print("; ".join(notes), highlight=False, soft_wrap=True)
