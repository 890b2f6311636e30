"""Records to everything that the page says; a pure function, but for what installed algorithms say of themselves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from flowbench.escape import plain
from flowbench.evaluation.statistics import LIKE, Over
from flowbench.record import RANDOM, Record
from flowbench.reporting.chosen import Chosen
from flowbench.reporting.groups import HEX, TUNED, is_trial
from flowbench.reporting.leaderboard import Board, board
from flowbench.reporting.page import about, curves, data, verdict
from flowbench.reporting.page.naming import names_of, short_names
from flowbench.reporting.page.workloads import workload
from flowbench.reporting.words import notes, titles

TOLD = ("python", "torch", "diffusers")  # packages whose versions the page names


def tables(records: Sequence[Record], split: str = "test", over: Over = LIKE) -> Board:
    """The tables of the page: those of a leaderboard, without runs of searches; no table where there is no record.

    Raises UsageError as `flowbench.reporting.leaderboard.board`.
    """
    shown = [r for r in records if not is_trial(r) and not r.model.endswith(RANDOM)]
    return board(shown, split, over) if shown else Board(())


def page_data(
    result: Board,
    records: Sequence[Record] = (),
    targets: Mapping[str, data.Goal] | None = None,
    spaces: Mapping[str, Mapping[str, str]] | None = None,
    walls: Sequence[data.Wall] = (),
    searches: Sequence[Chosen] = (),
) -> data.PageData:
    """What the page says of some tables.

    records: those that the tables were made from and those of searches, which are trials of a method; targets: by a
    workload's name, by default those that installed workloads state; spaces: search spaces, as `about.spaces` finds
    them; walls: images, as `samples.walls` finds them; searches: what they selected, as `find_chosen` finds them.
    Results of ruleset "tuned" stand beside those of the defaults, and are in no summary with them.
    """
    targets, spaces = about.targets(result) if targets is None else targets, spaces or {}
    short = short_names(result)
    workloads = tuple(
        workload(table, k, title, targets.get(table.workload.name))
        for k, (table, title) in enumerate(zip(result.tables, titles(result), strict=True))
    )
    summed = [k for k, table in enumerate(result.tables) if table.workload.ruleset != TUNED]
    summed = summed or list(range(len(result.tables)))
    profile = curves.profile([workloads[k] for k in summed], [short[k] for k in summed])
    algorithms = [row.algorithm for table in result.tables for row in table.rows]
    algorithms += [r.algorithm for r in records if is_trial(r)]
    ids = {name: w.id for name, w in zip(short, workloads, strict=True)}
    return data.PageData(
        verdict=tuple(_verdict(result, short, summed)),
        facts=_facts(result, records),
        warnings=tuple(_warnings(result, short)),
        overview=_overview(workloads, [workloads[k] for k in summed], profile),
        ordered_by=_ordered_by(profile, [workloads[k] for k in summed]),
        methods=about.methods(algorithms, records, spaces, searches),
        workloads=tuple(w.model_copy(update={"name": name}) for w, name in zip(workloads, short, strict=True)),
        profile=profile,
        walls=tuple(w.model_copy(update={"workload": ids[w.workload]}) for w in walls if w.workload in ids),
    )


def _verdict(result: Board, short: Sequence[str], summed: Sequence[int]) -> list[str]:
    """The verdict over the tables that are summed up, and a sentence or two for each of the others."""
    tables, names = result.tables, [names_of(table) for table in result.tables]
    said = verdict.overall([tables[k] for k in summed], [short[k] for k in summed], [names[k] for k in summed])
    for k, table in enumerate(tables):
        if k not in summed:
            first, *more = verdict.of_workload(table, names[k])
            said += [f"{short[k]}: {first}", *more[:1]]
    return said


def _warnings(result: Board, short: Sequence[str]) -> list[str]:
    """What a reader should know before any number."""
    lines = notes(result)
    mixed = [name for table, name in zip(result.tables, short, strict=True) if table.warnings]
    if mixed:
        lines.append(
            f"Careful: runs of different commits, devices or versions stand beside each other on {', '.join(mixed)}."
        )
    if result.tables and not any(table.workload.ruleset for table in result.tables):
        lines.append(
            "These runs were made under no ruleset: settings and searches may differ in effort between methods."
        )
    return lines


def _overview(
    workloads: Sequence[data.Workload], summed: Sequence[data.Workload], profile: data.Profile | None
) -> tuple[data.Standing, ...]:
    """All labels: by the area of their profile, then by their mean place on the workloads that are summed up."""
    rows: dict[str, list[int]] = {}
    methods = {row.label: row.method for w in workloads for row in w.rows}
    for w in summed:
        for place, row in enumerate(w.rows):
            rows.setdefault(row.label, []).append(place)
    area = {c.label: c.area for c in profile.curves} if profile else {}

    def order(label: str) -> tuple[float, float, str]:
        mean = sum(rows[label]) / len(rows[label]) if label in rows else math.inf
        return (-area.get(label, 0.0), mean, label)

    return tuple(
        data.Standing(label=label, method=methods[label], area=area.get(label)) for label in sorted(methods, key=order)
    )


def _ordered_by(profile: data.Profile | None, workloads: Sequence[data.Workload]) -> str:
    if profile:
        return "the area of the performance profile: how soon the target is reached, over all workloads with one"
    return "the mean place over workloads" if len(workloads) > 1 else "gain"


def _facts(result: Board, records: Sequence[Record]) -> data.Facts:
    rows = [row for table in result.tables for row in table.rows]
    runs = [r for row in rows for r in row.group.records]
    seeds = [row.seeds for row in rows]
    ended = sorted(r.finished for r in runs if r.finished)
    commits = Counter(_commit(r.commit) for r in runs)
    versions = [f"{name} {v}" for name in TOLD for v in sorted({r.versions[name] for r in runs if name in r.versions})]
    return data.Facts(
        runs=len(runs),
        failed=sum(row.failed for row in rows),
        methods=len({row.algorithm for row in rows}),
        seeds=(min(seeds), max(seeds)) if seeds else None,
        trials=sum(map(is_trial, records)),
        rulesets=tuple(sorted({plain(r.ruleset) for r in runs if r.ruleset})),
        commits=tuple(commit for commit, _ in commits.most_common()),
        devices=tuple(sorted({plain(r.device) for r in runs if r.device})),
        versions=tuple(map(plain, versions)),
        first=plain(ended[0][:10]) if ended else None,
        last=plain(ended[-1][:10]) if ended else None,
    )


def _commit(commit: str | None) -> str:
    return plain(commit[:HEX] + "+" * commit.endswith("+")) if commit else "unknown"
