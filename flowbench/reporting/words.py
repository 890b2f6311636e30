"""What a leaderboard says in sentences: a table's title, its verdict, what its numbers are, what to be careful with."""

from __future__ import annotations

from collections.abc import Sequence

from flowbench.escape import plain
from flowbench.evaluation.statistics import LIKE
from flowbench.reporting.columns import GAIN, Column
from flowbench.reporting.groups import HEX, TUNED, Workload
from flowbench.reporting.leaderboard import Board, Table
from flowbench.reporting.values import speaks
from flowbench.terms import UNGUIDED


def titles(board: Board) -> list[str]:
    """A line for each table, which tells it from the others."""
    plainly = [_title(table) for table in board.tables]
    return [
        f"{title} ({_details(table.workload)})" if plainly.count(title) > 1 else title
        for title, table in zip(plainly, board.tables, strict=True)
    ]


def _title(table: Table) -> str:
    w = table.workload
    name = f"{w.name}: " if w.name else ""
    rules = f", ruleset {w.ruleset}" if w.ruleset else ""
    return plain(f"{name}{w.model}, trained on {w.reward} with {w.images:,} images, split {table.split}{rules}")


def _details(workload: Workload) -> str:
    import hashlib

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:HEX]

    version = f"workload {workload.version[:HEX]}, " if workload.version else ""
    return plain(
        f"{version}protocol {workload.protocol}, prompts {digest(workload.prompts)}, weights {digest(workload.weights)}"
    )


def verdict(table: Table) -> str:
    """Who has the first place, and how small a difference the table can show."""
    if table.ranking is None or table.by is None:
        return ""
    standings, by = table.ranking.standings, plain(table.by)
    if len(standings) < 2:
        return f"Ordered by {by}; one method alone has no rank."
    if all(s.gain.seeds < 2 for s in standings):
        return f"Ordered by {by}. One seed: no intervals, and no method can be told from another."
    first = [plain(s.algorithm) for s in standings if s.shares_first]
    said = f"First place by {by}: {', '.join(first)}"
    if len(first) == len(standings):
        said = f"By {by} no method is separable from the others"
    elif len(first) > 1:
        said += " share it"
    # `compare` leaves a false claim to 5 % of tables.
    said += " (5 %, all pairs, corrected)."
    if table.smallest is not None:
        said += f" The smallest difference that such a table shows with probability 0.8 is {table.smallest:.3f}."
    return said


def legend(shown: Sequence[tuple[Table, Sequence[Column]]]) -> list[str]:
    """What the shown numbers of one or several tables are."""
    everything = [column for _, columns in shown for column in columns]
    meanings = dict.fromkeys(f"{plain(c.heading)}: {plain(c.meaning)}." for c in everything if c.meaning != GAIN)
    scores = [f"Scores are {GAIN} on the same prompts and noise, {_intervals([table for table, _ in shown])}."]
    if any(c.heading.endswith("*") for c in everything):
        scores.append("* the reward trained on.")
    if any(c.key.endswith(UNGUIDED) for c in everything):
        scores.append(f"{UNGUIDED}: sampled without guidance; the others at the model's own scale.")
    return [" ".join(scores), " ".join(meanings)]


def _intervals(tables: Sequence[Table]) -> str:
    tuned = [table for table in tables if table.workload.ruleset == TUNED]
    medians = "medians of the studies; ranks are of their means"
    if len(tuned) == len(tables):
        return medians
    if tuned:
        others = [table for table in tables if table.workload.ruleset != TUNED]
        return f"{_intervals(others)}; under ruleset {TUNED} {medians}"
    speak = {speaks(gains, table.over) for table in tables for gains in table.gains.values()}
    if all(row.seeds < 2 for table in tables for row in table.rows):
        return "without intervals: one seed"
    if speak == {LIKE}:
        return "95 % intervals over seeds and prompts (of prompts like these)"
    if LIKE in speak:
        return "95 % intervals over seeds and prompts (of prompts like these; over seeds where prompts are not known)"
    return "95 % intervals over seeds (of these prompts)"


def warnings(table: Table) -> list[str]:
    """What makes the rows of a table less comparable, and which runs failed."""
    lines = [f"Careful, {warning}." for warning in table.warnings]
    lost = [f"{row.failed} of {row.failed + row.seeds} runs of {plain(row.label)}" for row in table.rows if row.failed]
    if lost:
        tuned = table.workload.ruleset == TUNED
        rule = "a failed study counts as the worst" if tuned else "means are of the finished runs"
        lines.append(f"Failed: {', '.join(lost)}; {rule}.")
    single = [plain(row.label) for row in table.rows if row.seeds == 1]
    if single and any(row.seeds > 1 for row in table.rows):
        lines.append(f"One seed, hence no interval: {', '.join(single)}.")
    return lines


def notes(board: Board) -> list[str]:
    """What concerns all tables."""
    return [f"Careful, {note}." for note in board.notes]
