"""The leaderboard in the terminal, with rich."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flowbench.cli.display.console import console

if TYPE_CHECKING:
    from flowbench.reporting.leaderboard import Row


def leaderboard(table: Sequence[Row]) -> None:
    """A leaderboard in the terminal: one table per model, reward and budget; intervals where the terminal is wide."""
    from flowbench.reporting.leaderboard import LEGEND, cells, columns, headings

    shared = 5  # the columns model, reward, algorithm, seeds, images
    for (model, reward, images, _), group in groupby(table, lambda r: (r.model, r.reward, r.images, r.protocol)):
        lines = list(group)
        metrics = columns(lines)
        wide = console.width >= 26 + 24 * len(metrics)
        view = Table(title=f"{model}, trained on {reward} with {images} images", title_justify="left", box=SIMPLE_HEAD)
        view.pad_edge = False
        view.add_column("algorithm", no_wrap=True)
        for heading in ("seeds", *headings(metrics)[shared:]):
            view.add_column(heading.replace("_", " ") if not wide else heading, justify="right")
        for row in lines:
            values = cells(row, metrics)[shared:]
            shown = values if wide else [re.sub(r" \[[^]]*\]", "", value) for value in values]
            view.add_row(row.algorithm, str(row.seeds), *shown)
        console.print(view)
    console.print(LEGEND.replace("\\*", "*"), highlight=False)
    if not wide:
        console.print("intervals: widen the terminal, or --format markdown or csv", highlight=False)
