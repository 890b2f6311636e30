"""What `flowbench rewards ...` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from flowbench.cli.display.console import console
from flowbench.escape import terminal as escape

if TYPE_CHECKING:
    from flowbench.scoring.workers.management import Overlay
    from flowbench.services.parity import Finding


class _Progress:
    """One line that changes on a terminal, one line per step elsewhere."""

    def __enter__(self) -> Any:
        self.status: Any = console.status("") if console.is_terminal else None
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()

    def show(self, note: str) -> None:
        """The present step."""
        if self.status:
            self.status.update(escape(note))
        else:
            console.print(escape(note), highlight=False, soft_wrap=True)


class InstallProgress(_Progress):
    """What pip does."""

    def __call__(self, reward: str, note: str) -> None:
        """A step of one reward's installation."""
        self.show(f"{reward}: {note}")


class ParityProgress(_Progress):
    """What is compared."""

    def __call__(self, note: str) -> None:
        """The present step."""
        self.show(note)


def environments(overlays: Sequence[Overlay]) -> None:
    """State, size and licence of each environment."""
    table = Table()
    for heading in ("reward", "environment", "MB", "licence", "packages"):
        table.add_column(heading, overflow="fold")
    for o in overlays:
        size = f"{o.megabytes:.0f}" if o.megabytes else ""
        told = (o.info.name, str(o.state), size, o.info.licence, ", ".join(o.info.requirements))
        table.add_row(*map(escape, told))
    console.print(table)
    shared = {o.folder for o in overlays if [p.folder for p in overlays].count(o.folder) > 1}
    if shared:
        console.print("rewards with the same packages share one environment", highlight=False)


def installed(overlays: Sequence[Overlay]) -> None:
    """Where the environments are."""
    for o in overlays:
        line = f"{o.info.name}: {o.state}, {o.megabytes:.0f} MB in {o.folder}"
        console.print(escape(line), highlight=False, soft_wrap=True)


def removed(overlays: Sequence[Overlay]) -> None:
    """What is gone."""
    for o in overlays:
        line = f"{o.info.name}: removed {o.megabytes:.0f} MB from {o.folder}"
        console.print(escape(line), highlight=False, soft_wrap=True)


def parity(findings: Sequence[Finding], output: Path | None) -> None:
    """Differences, limits and what the controls changed; to a Markdown file if one is named."""
    from flowbench.files import write_atomically
    from flowbench.services.parity import to_markdown

    if output:
        write_atomically(output, to_markdown(findings))
    table = Table()
    for heading in ("what", "largest difference", "must be", ""):
        table.add_column(heading)
    for f in findings:
        bound = f"{'>' if f.control else '<='} {f.limit:.0e}" if f.limit else "0"
        mark = "[green]ok[/]" if f.ok else "[red]FAILS[/]"
        table.add_row(escape(("control: " if f.control else "") + f.what), f"{f.difference:.1e}", bound, mark)
    console.print(table)
