"""The pages that are made from published results, and where they differ from what the records say.

leaderboard/README.md, index.html, over-optimisation.md, claims.md, schema.json, and a part of the README
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flowbench.errors import UsageError
from flowbench.files import write_atomically
from flowbench.record import Record, read_records
from flowbench.reporting.audit.claims import claims, claims_page
from flowbench.reporting.audit.documents import draw, over_optimisation
from flowbench.reporting.chosen import Chosen, find_chosen, searches_markdown
from flowbench.reporting.columns import columns
from flowbench.reporting.documents import to_csv, to_markdown
from flowbench.reporting.groups import TUNED, is_trial
from flowbench.reporting.leaderboard import Board, board
from flowbench.reporting.page.about import spaces
from flowbench.reporting.page.build import page_data
from flowbench.reporting.page.render import html
from flowbench.reporting.results.files import VERSION
from flowbench.reporting.results.schema import schema_text
from flowbench.reporting.style import is_own, only_own_families

BEGIN, END = "<!-- made by flowbench leaderboard --write -->", "<!-- until here -->"
SPLIT = "test"
INDEX, IMAGES, RESULTS, README, SEARCHES = "index.html", "images", "results", "README.md", "search"
SEARCHED = """What each search selected on split dev, from how many trials, and what the best of k trials gains in the
mean. A value at an edge of its range says that a wider one might be better ([docs/tuning.md](../docs/tuning.md))."""
NOTHING_YET = """**No ranking is published yet.** Results are published here when every method had the same search,
seeds and rules, on one commit and one kind of device, and that campaign has not run to its end. The first table is
{history}, with the reasons why none of its numbers is a ranking.
"""

HEAD = """# Results

Made from the records below `results/` by `flowbench leaderboard --write`; nobody types a number. The rules are in
[docs/suites.md](../docs/suites.md), what the numbers are in [docs/statistics.md](../docs/statistics.md), and how a
method gets a row in [docs/submit.md](../docs/submit.md). [Over-optimisation](over-optimisation.md) says whether the
images get better while the reward rises, and [claims](claims.md) what holds of AC-Flow's. The first table is
[history](history/README.md).
"""


@dataclass(frozen=True)
class Pages:
    """Texts of whole files by their paths, and the board that pictures are drawn from."""

    files: Mapping[Path, str]
    board: Board


def pages(folder: Path, readme: Path) -> Pages:
    """What the pages of a leaderboard's folder, and the README beside it, must say.

    Raises UsageError for published records that cannot be read, and for a README without the place of the table.
    """
    # They must be the same wherever they are made, whichever plug-ins are installed there.
    with only_own_families():
        return _pages(folder, readme)


def _pages(folder: Path, readme: Path) -> Pages:
    records, tables = published(folder / RESULTS)
    searches = find_chosen(folder / SEARCHES)
    plain_tables = _untuned(tables)
    files = {
        folder / README: _board_page(tables, searches),
        folder / "over-optimisation.md": over_optimisation(plain_tables, IMAGES),
        folder / "claims.md": claims_page(claims(plain_tables.tables, records)),
        folder / "schema.json": schema_text(),
    }
    if tables.tables:
        declared = spaces(name for name in {r.algorithm for r in records} if is_own(name))
        files[folder / INDEX] = html(page_data(tables, records, spaces=declared, searches=searches), to_csv(tables))
    if readme.is_file():
        files[readme] = _with_part(readme, _summary(tables))
    return Pages(files, tables)


def _untuned(tables: Board) -> Board:
    """Without results of ruleset "tuned", which stand beside the defaults and are in no evidence together with them."""
    return replace(tables, tables=tuple(t for t in tables.tables if t.workload.ruleset != TUNED))


def published(root: Path) -> tuple[tuple[Record, ...], Board]:
    """All published records, and the tables of those that a suite made under a ruleset."""
    if not (root / VERSION).is_dir():
        return (), Board(())
    found = read_records([root / VERSION])
    if found.faults:
        raise UsageError(found.faults[0])
    shown = [r for r in found.records if r.ruleset is not None and not is_trial(r)]
    return found.records, board(shown, SPLIT) if shown else Board(())


def stale(made: Pages, folder: Path) -> list[str]:
    """A line for each page that is missing or says something else than the records; of the HTML its data count."""
    lines = []
    for path, text in made.files.items():
        there = path.read_text(encoding="utf-8") if path.is_file() else None
        if there is None:
            lines.append(f"{path}: is missing; flowbench leaderboard --write makes it")
        elif _data(path, there) != _data(path, text):
            lines.append(f"{path}: differs from the records; flowbench leaderboard --write makes it again")
    if not made.board.tables and (folder / INDEX).exists():
        lines.append(f"{folder / INDEX}: is there, and no result is published; remove it")
    return lines


def write(made: Pages, folder: Path) -> list[Path]:
    """Write the pages and their pictures; returns the files."""
    for path, text in made.files.items():
        write_atomically(path, text)
    with only_own_families():
        return [*made.files, *draw(_untuned(made.board), folder / IMAGES)]


_PAYLOAD = re.compile(r"<script[^>]*type=\"application/json\"[^>]*>.*?</script>", re.DOTALL)


def _data(path: Path, text: str) -> str:
    """What must agree: of the HTML the data in it, since its look may change without a new result."""
    return "\n".join(_PAYLOAD.findall(text)) if path.suffix == ".html" else text


def _board_page(tables: Board, searches: Sequence[Chosen]) -> str:
    nothing = NOTHING_YET.format(history="[history](history/README.md)")
    found = f"\n### Searches\n\n{SEARCHED}\n\n{searches_markdown(searches)}\n" if searches else ""
    return f"{HEAD}\n{to_markdown(tables) if tables.tables else nothing}{found}"


def _summary(tables: Board) -> str:
    """The README's part: each table's verdict and the columns that decide."""
    if not tables.tables:
        return NOTHING_YET.format(history="[history]")
    keys = list(dict.fromkeys(c.key for t in tables.tables for c in columns(t).values() if c.deciding and c.usual))
    more = "More is in [leaderboard/README.md]; the first table is [history], and no number of it is a ranking."
    return f"{to_markdown(tables, keys)}\n{more}\n"


def _with_part(readme: Path, part: str) -> str:
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"'{readme}' has no place for the table; it stands between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{part}\n{END}{after}"
