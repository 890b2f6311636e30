"""Records to everything that the page says; a pure function, but for what installed algorithms say of themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from flowbench.evaluation.statistics import LIKE, Over
from flowbench.record import RANDOM, Record
from flowbench.reporting.escape import plain
from flowbench.reporting.groups import HEX
from flowbench.reporting.leaderboard import Board, Table, board
from flowbench.reporting.page import about, curves, data, verdict
from flowbench.reporting.page.tables import names_of, workload
from flowbench.reporting.words import notes, titles

TOLD = ("python", "torch", "diffusers")  # packages whose versions the page names


def page_data(
    records: Sequence[Record],
    split: str = "test",
    over: Over = LIKE,
    targets: Mapping[str, tuple[str, float]] | None = None,
    spaces: Mapping[str, Mapping[str, str]] | None = None,
    walls: Sequence[data.Wall] = (),
) -> data.PageData:
    """What the page says of some records.

    split: of the tables; over: what intervals speak of; targets: by a workload's name its target's metric and gain on
    `dev`; spaces: search spaces, as `about.spaces` finds them; walls: images, as `samples.walls` finds them. Runs of
    searches are trials of a method and stand in no table. No record at all makes a page that says so.
    Raises UsageError as `flowbench.reporting.leaderboard.board`.
    """
    records = [r for r in records if not r.model.endswith(RANDOM)]
    shown = [r for r in records if r.ruleset != about.SEARCH]
    result = board(shown, split, over) if shown else Board(())
    return from_board(result, records, targets or {}, spaces or {}, walls)


def from_board(
    result: Board,
    records: Sequence[Record],
    targets: Mapping[str, tuple[str, float]],
    spaces: Mapping[str, Mapping[str, str]],
    walls: Sequence[data.Wall] = (),
) -> data.PageData:
    """As `page_data`, where the tables are there already."""
    short = short_names(result)
    workloads = tuple(
        workload(table, k, title, targets.get(table.workload.name))
        for k, (table, title) in enumerate(zip(result.tables, titles(result), strict=True))
    )
    profile = curves.profile(workloads, short)
    algorithms = [row.algorithm for table in result.tables for row in table.rows]
    algorithms += [r.algorithm for r in records if r.ruleset == about.SEARCH]
    ids = {name: w.id for name, w in zip(short, workloads, strict=True)}
    return data.PageData(
        verdict=tuple(verdict.overall(result.tables, short, [names_of(table) for table in result.tables])),
        facts=_facts(result, records),
        warnings=tuple(notes(result)),
        overview=_overview(workloads, profile),
        ordered_by=_ordered_by(profile, workloads),
        methods=about.methods(algorithms, records, spaces),
        workloads=tuple(w.model_copy(update={"name": name}) for w, name in zip(workloads, short, strict=True)),
        profile=profile,
        walls=tuple(w.model_copy(update={"workload": ids[w.workload]}) for w in walls if w.workload in ids),
    )


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


def _overview(workloads: Sequence[data.Workload], profile: data.Profile | None) -> tuple[data.Standing, ...]:
    """All labels: by the area of their profile, else by the mean place that all pairs admit."""
    rows: dict[str, list[tuple[float, float]]] = {}
    methods: dict[str, str] = {}
    for w in workloads:
        for place, row in enumerate(w.rows):
            best, worst = row.rank or (len(w.rows), len(w.rows))
            rows.setdefault(row.label, []).append(((best + worst) / 2, place))
            methods[row.label] = row.method
    area = {c.label: c.area for c in profile.curves} if profile else {}

    def order(label: str) -> tuple[float, float, float, str]:
        ranks, places = (sum(column) / len(rows[label]) for column in zip(*rows[label], strict=True))
        return (-area.get(label, 0.0), ranks, places, label)

    return tuple(
        data.Standing(label=label, method=methods[label], area=area.get(label)) for label in sorted(rows, key=order)
    )


def _ordered_by(profile: data.Profile | None, workloads: Sequence[data.Workload]) -> str:
    if profile:
        return "the area of the performance profile: how soon the target is reached, over all workloads with one"
    return "the mean of the ranks that all pairs admit" if len(workloads) > 1 else "rank"


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
        trials=sum(r.ruleset == about.SEARCH for r in records),
        rulesets=tuple(sorted({plain(r.ruleset) for r in runs if r.ruleset})),
        commits=tuple(commit for commit, _ in commits.most_common()),
        devices=tuple(sorted({plain(r.device) for r in runs if r.device})),
        versions=tuple(map(plain, versions)),
        first=plain(ended[0][:10]) if ended else None,
        last=plain(ended[-1][:10]) if ended else None,
    )


def _commit(commit: str | None) -> str:
    return plain(commit[:HEX] + "+" * commit.endswith("+")) if commit else "unknown"
