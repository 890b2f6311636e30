"""What the columns of a leaderboard say: of each row, and in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from flowbench.errors import UsageError, did_you_mean
from flowbench.escape import plain
from flowbench.evaluation.statistics import Interval, Reached, interquartile_mean, probability_of_improvement
from flowbench.reporting.groups import TUNED
from flowbench.reporting.leaderboard import HELD_OUT, TRUTH, Row, Table
from flowbench.reporting.targets import DIVERSITY, Unit
from flowbench.reporting.values import speaks
from flowbench.terms import UNGUIDED, plain_metric

# A number with its interval's ends, with half its width, or alone.
Form: TypeAlias = Literal["full", "compact", "bare"]

NOTHING = "-"
GAIN = "tuned minus base"


@dataclass(frozen=True)
class Column:
    """One column. key: its name in `--columns`; deciding: shown where little fits; usual: shown unless told.

    foreign: whether its cells are names of records, which every format must escape.
    """

    key: str
    heading: str
    meaning: str
    text: Callable[[Row, Form], str]
    deciding: bool = False
    usual: bool = True
    foreign: bool = False


def columns(table: Table) -> dict[str, Column]:
    """All columns that a table can show beside the algorithm's, by key, in order."""
    some_failed = any(row.failed for row in table.rows)
    found = [
        Column("rank", "rank", "best and worst that all pairs admit", _rank, True, bool(table.by)),
        Column("seeds", "seeds", "finished runs", lambda row, form: str(row.seeds), deciding=True),
        Column("failed", "failed", "runs that gave no result", _failed, some_failed, some_failed),
        *_studies(table),
        *(_metric(table, metric) for metric in table.metrics),
        *_statistics(table),
        *(_to_target(table, unit) for unit in _UNITS),
        Column("seconds", "seconds", "of training", lambda row, form: _count(row.seconds), deciding=True),
        Column("images", "images", "generated for training", lambda row, form: _count(row.images), usual=False),
        Column(
            "evaluations", "evaluations", "velocities of one latent", lambda r, f: _count(r.evaluations), usual=False
        ),
        Column("calls", "reward calls", "in training", lambda row, form: _count(row.reward_calls), usual=False),
        Column("family", "family", "of the method", lambda row, form: row.family, usual=False, foreign=True),
    ]
    return {column.key: column for column in found}


def choose(table: Table, keys: Sequence[str] | None) -> list[Column]:
    """The table's columns of these keys, in their order, or the usual ones."""
    known = columns(table)
    if keys is None:
        return [column for column in known.values() if column.usual]
    return [known[key] for key in keys if key in known]


def check_keys(tables: Sequence[Table], keys: Sequence[str]) -> None:
    """Raise UsageError for a key that no table has a column for."""
    known = dict.fromkeys(key for table in tables for key in columns(table))
    for key in keys:
        if key not in known:
            raise UsageError(f"unknown column '{plain(key)}'{did_you_mean(key, map(plain, known))}")


def number(value: float, signed: bool = False) -> str:
    """Three decimals, fewer for large numbers."""
    sign = "+" if signed else ""
    if not math.isfinite(value):
        return str(value)
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign},.0f}"


def interval_text(found: Interval | None, form: Form = "full", signed: bool = True) -> str:
    """ "+0.083 [+0.071, +0.094]", "+0.083 ±0.012" or "+0.083"; without an interval where there is none."""
    if found is None:
        return NOTHING
    value = number(found.value, signed)
    if found.low is None or found.high is None or form == "bare":
        return value
    if form == "full":
        return f"{value} [{number(found.low, signed)}, {number(found.high, signed)}]"
    return f"{value} ±{number((found.high - found.low) / 2)}"


def _metric(table: Table, metric: str) -> Column:
    if plain_metric(metric) == DIVERSITY:
        return Column(metric, metric, "share of the base model's", _share(metric), metric == DIVERSITY)
    if metric == HELD_OUT:
        meaning = "mean gain of the judges not trained on, in standard deviations of the base model between prompts"
        return Column(metric, metric, meaning, _gain(metric), deciding=True)
    trained = plain_metric(metric) in table.trained
    deciding = metric in (table.by, TRUTH, "kl") or (trained and not metric.endswith(UNGUIDED))
    return Column(metric, metric + "*" * trained, GAIN, _gain(metric), deciding)


def _gain(metric: str) -> Callable[[Row, Form], str]:
    def text(row: Row, form: Form) -> str:
        if metric in row.broken:
            return f"not finite in {row.broken[metric]}"
        return interval_text(row.gains[metric], form) if metric in row.gains else ""

    return text


def _share(metric: str) -> Callable[[Row, Form], str]:
    def text(row: Row, form: Form) -> str:
        if metric in row.broken:
            return f"not finite in {row.broken[metric]}"
        if metric not in row.retained:
            return ""
        kept = row.retained[metric]
        return "base has none" if kept is None else f"x {interval_text(kept, form, signed=False)}"

    return text


def _studies(table: Table) -> list[Column]:
    """The results of which a row's score is the median."""
    by = table.by
    if table.workload.ruleset != TUNED or by is None:
        return []
    gains = table.gains[by]

    def text(row: Row, form: Form) -> str:
        results = [r for r in gains.values[gains.algorithms.index(row.label)].mean(-1) if math.isfinite(r)]
        return ", ".join([*(number(r, signed=True) for r in results), *["failed"] * row.failed])

    return [Column("studies", "studies", f"{by} of each study; the median is the score", text, deciding=True)]


def _rank(row: Row, form: Form) -> str:
    if row.standing is None:
        return NOTHING
    best, worst = row.standing.rank
    return str(best) if best == worst else f"{best}-{worst}"


def _failed(row: Row, form: Form) -> str:
    return f"{row.failed} of {row.failed + row.seeds}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else NOTHING


def _statistics(table: Table) -> list[Column]:
    """Interquartile mean, and what compares a row with the first one."""
    by = table.by
    if by is None or table.ranking is None:
        return []
    gains, first = table.gains[by], table.ranking.standings[0].algorithm
    over = speaks(gains, table.over)
    pairs = {pair.other: pair for pair in table.ranking.pairs if pair.one == first}

    def middle(row: Row, form: Form) -> str:
        return interval_text(interquartile_mean(gains, row.label, over), form) if row.standing else NOTHING

    def better(row: Row, form: Form) -> str:
        if row.label not in pairs or not pairs[row.label].difference.seeds:
            return NOTHING
        return interval_text(probability_of_improvement(gains, row.label, first, over), form, signed=False)

    def behind(row: Row, form: Form) -> str:
        if row.label not in pairs or not pairs[row.label].difference.seeds:
            return NOTHING
        d = pairs[row.label].difference
        low, high = (None, None) if d.low is None or d.high is None else (-d.high, -d.low)
        return interval_text(Interval(-d.value, low, high, d.over, d.seeds, d.prompts), form)

    def p(row: Row, form: Form) -> str:
        if row.label not in pairs:
            return NOTHING
        value = pairs[row.label].p_holm
        return f"{value:.3f}" if value >= 0.001 else "<0.001"

    named = plain(first)
    return [
        Column("iqm", f"{by} IQM", "mean of the middle half of all gains", middle, usual=False),
        Column("improvement", "better", f"how often above {named} on the same prompt and noise", better, usual=False),
        Column("difference", "difference", f"in {by} from {named}, paired", behind, usual=False),
        Column("p", "p", f"of that difference, Holm's correction for {len(table.ranking.pairs)} pairs", p, usual=False),
    ]


_UNITS: tuple[Unit, ...] = ("images", "seconds")


def _to_target(table: Table, unit: Unit) -> Column:
    def text(row: Row, form: Form) -> str:
        return _reached(row.to_target[unit]) if unit in row.to_target else NOTHING

    there, meaning = any(unit in row.to_target for row in table.rows), "none was given"
    if target := table.target:
        meaning = (
            f"median over runs until {plain(target.metric)} on dev is {target.value:g} with {target.floor:g} of the "
            "base model's diversity, and how many got there"
        )
    return Column(f"{unit}-to-target", f"{unit} to target", meaning, text, there and unit == "images", there)


def _reached(costs: Reached) -> str:
    arrived = round(costs.share * len(costs.costs))
    median = f"{costs.median:,.0f}" if math.isfinite(costs.median) else "never"
    return f"{median} ({arrived} of {len(costs.costs)})"
