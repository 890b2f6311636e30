"""Sentences that the statistics allow, and no others: who shares the first place, and what cannot be told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowbench.escape import plain
from flowbench.evaluation.statistics import Pair
from flowbench.reporting.groups import TUNED
from flowbench.reporting.leaderboard import Table

SIZE = 0.05  # of the corrected tests


@dataclass(frozen=True)
class Place:
    """What a table's ranking says. first: who shares the first place among those that can be told from others.

    rest: the others; untold: methods with a single finished run; unfinished: without any. beaten: whether each of
    `first` is told from each of `rest`.
    """

    first: tuple[str, ...]
    rest: tuple[str, ...]
    untold: tuple[str, ...]
    unfinished: tuple[str, ...]
    beaten: bool

    @property
    def decided(self) -> bool:
        """Whether there are two methods that could be told apart."""
        return len(self.first) + len(self.rest) > 1


def place(table: Table) -> Place:
    """The methods of a table by what its ranking says of them.

    A single seed has no interval, and so would share the first place whatever its gain: it is named apart.
    """
    unfinished = tuple(row.label for row in table.rows if not row.seeds)
    if table.ranking is None:
        return Place((), (), (), tuple(row.label for row in table.rows), False)
    told = [s for s in table.ranking.standings if s.gain.low is not None]
    untold = tuple(s.algorithm for s in table.ranking.standings if s.gain.low is None)
    first = tuple(s.algorithm for s in told if s.shares_first)
    rest = tuple(s.algorithm for s in told if not s.shares_first)
    found = {(pair.one, pair.other): pair for pair in table.ranking.pairs}
    beaten = all(_beats(found, one, other) for one in first for other in rest)
    return Place(first, rest, untold, unfinished, beaten)


def _beats(pairs: Mapping[tuple[str, str], Pair], one: str, other: str) -> bool:
    pair = pairs.get((one, other))
    return pair is not None and pair.p_holm <= SIZE and pair.difference.value > 0


def of_workload(table: Table, names: Mapping[str, str]) -> list[str]:
    """The verdict of one table, in two sentences or a few more. names: labels as they are shown."""
    if table.ranking is None or table.by is None:
        if all(not row.seeds for row in table.rows):
            return ["No run has finished: there is nothing to compare."]
        return ["No score that all finished runs have orders this table."]
    at, said = place(table), []
    by = plain(table.by)
    told = len(at.first) + len(at.rest)
    if not told:
        one = "One finished run a method" if len(at.untold) > 1 else f"One finished run, of {names[at.untold[0]]}"
        said.append(f"{one}: there are no intervals, and nothing can be told apart.")
    elif told == 1:
        said += _alone(table, at, names, by)
    else:
        said += _shared(table, at, names, by)
    if told and at.untold:
        said.append(f"Nothing can be told of {listed(at.untold, names)}: one finished run.")
    if at.unfinished:
        said.append(f"No run of {listed(at.unfinished, names)} finished.")
    if at.decided and table.smallest is not None and math.isfinite(table.smallest):
        smallest = f"The smallest difference that {seeds_of(table)} can show here is {table.smallest:.2g}"
        said.append(f"{smallest} (with probability 0.8).")
    return said


def _alone(table: Table, at: Place, names: Mapping[str, str], by: str) -> list[str]:
    """One method with an interval: only the base model is there to be compared with."""
    (label,) = at.first or at.rest
    gain = next(row.gains[table.by] for row in table.rows if row.label == label and table.by)
    if gain.low is not None and gain.low > 0:
        said = "above the base model's"
    elif gain.high is not None and gain.high < 0:
        said = "below the base model's"
    else:
        said = "not separable from the base model's"
    return [f"{names[label]} alone was run often enough to be judged: its {by} is {said}, and it has no rank."]


def _shared(table: Table, at: Place, names: Mapping[str, str], by: str) -> list[str]:
    at_seeds = f"by {by} at {seeds_of(table)}"
    if not at.rest:
        return [f"No method is separable from the others {at_seeds} (5 %, all pairs, corrected)."]
    first, alone = listed(at.first, names), len(at.first) == 1
    lead = f"{first} alone has the first place {at_seeds}" if alone else f"{first} share the first place {at_seeds}"
    said = [f"{lead}." if alone else f"{lead}: no difference between them can be told."]
    others = names[at.rest[0]] if len(at.rest) == 1 else f"the other {count(len(at.rest))}"
    if at.beaten:
        who = "It beats" if alone else "Both beat" if len(at.first) == 2 else "All of them beat"
        said.append(f"{who} {others} (5 %, all pairs, corrected).")
    else:
        each = others if len(at.rest) == 1 else f"Each of {others}"
        said.append(f"{each} is behind at least one method (5 %, all pairs, corrected).")
    return said


def overall(tables: Sequence[Table], short: Sequence[str], names: Sequence[Mapping[str, str]]) -> list[str]:
    """The verdict of the page. short: how each workload is called; names: of each, labels as they are shown."""
    if not tables:
        return ["There is no result yet: no record of a run was found."]
    if len(tables) == 1:
        return of_workload(tables[0], names[0])
    places = [place(table) for table in tables]
    decided = [k for k, at in enumerate(places) if at.decided]
    if not decided:
        return ["Nothing can be told apart yet: no workload has two methods with two finished runs each."]
    everywhere = [label for label in places[decided[0]].first if all(label in places[k].first for k in decided)]
    all_equal = all(not places[k].rest for k in decided)
    rest = [_undecided(short[k]) for k, at in enumerate(places) if not at.decided]
    if len(decided) == 1:
        (only,) = decided
        return [
            f"{short[only]}: {said}" if k == 0 else said
            for k, said in enumerate(of_workload(tables[only], names[only]))
        ] + rest
    said = []
    on = "on both workloads" if len(decided) == 2 else f"on all {count(len(decided))} workloads"
    shown = names[decided[0]]
    if all_equal:
        said.append(f"No method is separable from the others {on} (5 % a workload, all pairs, corrected).")
    elif len(everywhere) == 1:
        said.append(f"{shown[everywhere[0]]} is the only method that is in the first place {on}, alone or shared.")
    elif everywhere:
        said.append(f"{listed(everywhere, shown)} are in the first place {on}, shared where no difference can be told.")
    else:
        said.append(f"No method is in the first place {on}.")
    if not all_equal:
        said += [_line(places[k], short[k], names[k]) for k in decided]
    return said + rest


def _undecided(short: str) -> str:
    return f"{short}: nothing can be told yet, for want of two methods with two finished runs each."


def _line(at: Place, short: str, names: Mapping[str, str]) -> str:
    if not at.rest:
        return f"{short}: no method is separable from the others."
    rest = names[at.rest[0]] + " is" if len(at.rest) == 1 else f"each of the other {count(len(at.rest))} is"
    return f"{short}: first {listed(at.first, names)}; {rest} behind at least one method (5 %, all pairs, corrected)."


def seeds_of(table: Table) -> str:
    """ "10 seeds", "3 to 5 seeds", or "3 studies": of the methods that have an interval."""
    what = "studies" if table.workload.ruleset == TUNED else "seeds"
    numbers = sorted({row.seeds for row in table.rows if row.seeds > 1} or {row.seeds for row in table.rows})
    return f"{numbers[0]} {what}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} {what}"


def listed(labels: Sequence[str], names: Mapping[str, str]) -> str:
    """ "a, b and c"."""
    shown = [names.get(label, label) for label in labels]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def count(n: int) -> str:
    """A small number as a word."""
    return _WORDS[n] if n < len(_WORDS) else str(n)
