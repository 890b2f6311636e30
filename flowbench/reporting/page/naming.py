"""What workloads and rows are called on the page: printable, unique, as short as can be."""

from __future__ import annotations

from flowbench.escape import plain
from flowbench.reporting.leaderboard import Board, Table


def short_names(result: Board) -> list[str]:
    """What each workload is called in a sentence and above a column; unique."""
    names = [_short(table) for table in result.tables]
    longer = [
        f"{name}, {table.workload.images:,} images" if names.count(name) > 1 else name
        for name, table in zip(names, result.tables, strict=True)
    ]
    return [f"{name} ({k + 1})" if longer.count(name) > 1 else name for k, name in enumerate(longer)]


def _short(table: Table) -> str:
    w = table.workload
    name = w.name or f"{w.model} / {w.reward}"
    return plain(f"{name}, {w.ruleset}" if w.ruleset and w.ruleset != "defaults" else name)


def names_of(table: Table) -> dict[str, str]:
    """Each row's label as the page shows it: printable, and still unique."""
    shown: dict[str, str] = {}
    for row in table.rows:
        name = plain(row.label)
        shown[row.label] = name if name not in shown.values() else f"{name} #{len(shown)}"
    return shown
