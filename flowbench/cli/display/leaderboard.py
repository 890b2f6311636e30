"""The leaderboard in the terminal: whatever the width, every number is whole, and what is left out is named."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as View
from rich.text import Text

from flowbench.cli.display.console import console
from flowbench.escape import plain
from flowbench.reporting.columns import Column, Form, choose
from flowbench.reporting.leaderboard import Board, Row, Table
from flowbench.reporting.style import mark
from flowbench.reporting.words import legend, notes, titles, verdict, warnings

GAP = 2  # spaces between columns
NAME = 16  # a method's name is folded at this width, or at a third of the terminal's
MARK = 2  # a method's mark and a space before its name

FORMS: tuple[Form, ...] = ("full", "compact", "bare")


@dataclass(frozen=True)
class Layout:
    """The columns that are shown, in which form, and what is left out to make them fit."""

    columns: tuple[Column, ...]
    form: Form
    left_out: tuple[str, ...] = ()


def show(board: Board, keys: Sequence[str] | None = None, transpose: bool = False) -> str:
    """Print a board; returns an empty text, for there is nothing left to print."""
    _print(board, keys, transpose, console)
    return ""


def as_text(board: Board, keys: Sequence[str] | None = None, transpose: bool = False) -> str:
    """What `show` prints, without colours."""
    out = Console(file=io.StringIO(), width=console.width, color_system=None)
    _print(board, keys, transpose, out)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def _print(board: Board, keys: Sequence[str] | None, transpose: bool, out: Console) -> None:
    shown = []
    for title, table in zip(titles(board), board.tables, strict=True):
        layout = (_transposed if transpose else arrange)(table, keys, out.width)
        _say(out, title)
        views = _side_by_side(table, layout, out) if transpose else _blocks(table, layout, out)
        for view in views:
            out.print(view)
        _say(out, verdict(table), *warnings(table), _left_out(layout))
        out.print()
        shown.append((table, layout.columns))
    _say(out, *legend(shown), *notes(board))


def _say(out: Console, *lines: str) -> None:
    for line in filter(None, lines):
        out.print(Text(line))


def arrange(table: Table, keys: Sequence[str] | None, width: int) -> Layout:
    """The most that fits a width: all columns or those that decide, their intervals as far as there is room.

    Columns that were asked for are all shown, in several blocks if need be.
    """
    usual = choose(table, keys)
    if keys is not None:
        form = next((f for f in FORMS[:2] if _fits(table, usual, f, width)), FORMS[1])
        return Layout(tuple(usual), form)
    deciding = [column for column in usual if column.deciding]
    hidden = tuple(plain(column.key) for column in usual if not column.deciding)
    for chosen, form in ((usual, "full"), (usual, "compact"), (deciding, "compact"), (deciding, "bare")):
        if _fits(table, chosen, _form(form), width) or form == "bare":
            out = hidden if chosen is deciding else ()
            return Layout(tuple(chosen), _form(form), (*out, *(["intervals"] if form == "bare" else [])))
    raise AssertionError("the last layout is always taken")


def _form(name: str) -> Form:
    return next(form for form in FORMS if form == name)


def _transposed(table: Table, keys: Sequence[str] | None, width: int) -> Layout:
    """All columns, with both ends of the intervals where at least two methods fit beside each other."""
    chosen = choose(table, keys)
    names = max((cell_len(_heading(c)) for c in chosen), default=0)
    widest = max((cell_len(c.text(row, "full")) for c in chosen for row in table.rows), default=0)
    return Layout(tuple(chosen), "full" if names + 2 * (widest + GAP) <= width else "compact")


def _left_out(layout: Layout) -> str:
    if not layout.left_out:
        return ""
    names = [name for name in layout.left_out if name != "intervals"]
    how = f"--columns {','.join(names[:2])}{',...' if len(names) > 2 else ''}, " if names else ""
    return f"Left out: {', '.join(layout.left_out)}; see --transpose, {how}a wider terminal or --format markdown."


def _heading(column: Column) -> str:
    return plain(column.heading)


def _column_width(table: Table, column: Column, form: Form) -> int:
    """A heading may be wrapped between its words, a cell never."""
    words = _heading(column).replace("_", " ").split(" ")
    return max(map(cell_len, [*words, *(plain(column.text(row, form)) for row in table.rows)]))


def _name_width(table: Table, width: int) -> int:
    longest = max([cell_len(plain(row.label)) for row in table.rows] + [len("algorithm") - MARK])
    return MARK + min(longest, max(NAME, width // 3))


def _fits(table: Table, chosen: Sequence[Column], form: Form, width: int) -> bool:
    widths = [_column_width(table, column, form) for column in chosen]
    return _name_width(table, width) + sum(GAP + w for w in widths) <= width


def _blocks(table: Table, layout: Layout, out: Console) -> Iterator[View]:
    """The table in as many blocks of columns as its width needs, the method's name in each."""
    name, rest = _name_width(table, out.width), list(layout.columns)
    while rest:
        taken, used = [rest.pop(0)], 0
        used = name + GAP + _column_width(table, taken[0], layout.form)
        while rest and used + GAP + (more := _column_width(table, rest[0], layout.form)) <= out.width:
            taken.append(rest.pop(0))
            used += GAP + more
        view = _view()
        view.add_column("algorithm", overflow="fold", width=name)
        for column in taken:
            heading = _heading(column).replace("_", " ")
            view.add_column(Text(heading), justify="right", no_wrap=False, overflow="fold")
            view.columns[-1].min_width = _column_width(table, column, layout.form)
        for row in table.rows:
            cells = (Text(plain(column.text(row, layout.form)), no_wrap=True) for column in taken)
            view.add_row(_named(row, out), *cells)
        yield view


def _side_by_side(table: Table, layout: Layout, out: Console) -> Iterator[View]:
    """Methods as columns, in as many blocks as the width needs."""
    first = max((cell_len(_heading(c)) for c in layout.columns), default=0)
    cells = {row.label: [plain(c.text(row, layout.form)) for c in layout.columns] for row in table.rows}
    rest = list(table.rows)

    def width(row: Row) -> int:
        return max(map(cell_len, [*cells[row.label], "x" * min(MARK + cell_len(plain(row.label)), NAME)]))

    while rest:
        taken = [rest.pop(0)]
        used = first + GAP + width(taken[0])
        while rest and used + GAP + width(rest[0]) <= out.width:
            used += GAP + width(rest[0])
            taken.append(rest.pop(0))
        view = _view()
        view.add_column("", no_wrap=True)
        for row in taken:
            view.add_column(_named(row, out), justify="right", overflow="fold", width=width(row))
        for k, column in enumerate(layout.columns):
            view.add_row(Text(_heading(column)), *(Text(cells[row.label][k], no_wrap=True) for row in taken))
        yield view


def _view() -> View:
    return View(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def _named(row: Row, out: Console) -> Text:
    """A method's name behind its mark, as in every picture."""
    look = mark(row.algorithm, row.family)
    glyph = look.glyph if out.encoding.lower().startswith("utf") else "*"
    return Text.assemble((f"{glyph} ", look.color), plain(row.label))
