"""What the records of a contribution must keep to together, and beside those that are published."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from flowbench.errors import UsageError
from flowbench.record import Record
from flowbench.reporting.escape import plain
from flowbench.reporting.groups import mixtures
from flowbench.reporting.leaderboard import board
from flowbench.reporting.results.single import faults_of as faults_of_one

DEFAULTS, REHEARSAL = "defaults", None  # rulesets of suites that say which seeds there must be
RULESETS = (DEFAULTS, "tuned", "search")

# By ruleset and workload: the seeds of every algorithm.
Seeds: TypeAlias = "Mapping[tuple[str | None, str], Sequence[int]]"


@dataclass(frozen=True)
class Request:
    """What may be in a contribution.

    seeds: of suites; published: records that are in the results already; rehearsal, ablation: whether runs of the
    rehearsal, or runs of no workload, may be in it.
    """

    seeds: Seeds
    published: tuple[Record, ...] = field(default=())
    rehearsal: bool = False
    ablation: bool = False


def name_of(record: Record) -> str:
    """The run, for a line."""
    where = record.workload or f"{record.model} / {record.reward}"
    rules = f", {record.ruleset}" if record.ruleset else ""
    return plain(f"{record.algorithm} on {where}{rules}, seed {record.seed}")


def faults_of(records: Sequence[Record], request: Request) -> list[str]:
    """A line for each check that fails; none for a contribution that can be published."""
    if not records:
        return ["there is no record; finish the runs first, see 'flowbench suite show'"]
    lines = [f"{name_of(r)}: {fault}" for r in records for fault in (*_allowed(r, request), *faults_of_one(r))]
    checks: tuple[Callable[[Sequence[Record], Request], Iterable[str]], ...]
    checks = (_one_code, _none_twice, _all_seeds, _one_setting, _same_seeds, _beside_published)
    return [*lines, *(fault for check in checks for fault in check(records, request))]


def _allowed(record: Record, request: Request) -> Iterator[str]:
    """A result is one of a ruleset; what only tries the way, or is of no workload, is asked for."""
    if record.workload is None:
        if not request.ablation:
            yield "was made for no workload; run a suite, or publish an ablation with --ablation"
    elif record.ruleset is None:
        if not request.rehearsal:
            yield "was made under no ruleset; say so in the suite, or try the way with --rehearsal"
    elif record.ruleset not in RULESETS:
        yield f"was made under ruleset '{plain(record.ruleset)}', which is unknown"


def _one_code(records: Sequence[Record], request: Request) -> Iterator[str]:
    """One commit without changes; under one ruleset one kind of device and one set of versions too."""
    dirty = sum((r.commit or "").endswith("+") for r in records)
    if dirty:
        yield f"{dirty} runs are of a changed source tree; commit or undo the changes and run them again"
    nowhere = sum(r.commit is None for r in records)
    if nowhere:
        yield f"{nowhere} runs do not know their commit; run flowbench from a checkout"
    for ruleset in dict.fromkeys(r.ruleset for r in records):  # a search may be older than the results
        finished = [r for r in records if r.status == "finished" and r.ruleset == ruleset]
        yield from (f"{fault}; run all on one installation" for fault in mixtures(finished))


def _none_twice(records: Sequence[Record], request: Request) -> Iterator[str]:
    counts = Counter((name_of(r), r.config_hash) for r in records)
    yield from (f"{name}: is there {n} times; keep one" for (name, _), n in sorted(counts.items()) if n > 1)


def _all_seeds(records: Sequence[Record], request: Request) -> Iterator[str]:
    """Every seed of the suite's list is there, those that failed as failed; the published ones count."""
    there: dict[tuple[str | None, str, str], set[int]] = defaultdict(set)
    for r in (*records, *request.published):
        if r.workload is not None:
            there[r.ruleset, r.workload, r.algorithm].add(r.seed)
    mine = {(r.ruleset, r.workload, r.algorithm) for r in records if r.workload is not None}
    for ruleset, workload, algorithm in sorted(mine, key=str):
        found, wanted = there[ruleset, workload, algorithm], request.seeds.get((ruleset, workload))
        label = plain(f"{algorithm} on {workload}")
        if wanted is None:
            if ruleset in (DEFAULTS, REHEARSAL):
                yield f"{label}: no suite of ruleset '{ruleset}' has this workload"
            continue
        if missing := sorted({*wanted} - found):
            yield f"{label}: seeds {_listed(missing)} are missing; finish the suite, failed runs count"
        if more := sorted(found - {*wanted}):
            yield f"{label}: seeds {_listed(more)} are not in the suite's list; leave them out"


def _one_setting(records: Sequence[Record], request: Request) -> Iterator[str]:
    """Under `defaults` an algorithm has one setting on a workload."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for r in (*records, *request.published):
        if r.ruleset == DEFAULTS and r.workload is not None:
            found[r.algorithm, r.workload].add(r.config_hash)
    mine = {(r.algorithm, r.workload) for r in records}
    for (algorithm, workload), hashes in sorted(found.items()):
        if len(hashes) > 1 and (algorithm, workload) in mine:
            named = plain(", ".join(sorted(hashes)))
            yield f"{plain(algorithm)} on {plain(workload)}: has several settings under '{DEFAULTS}': {named}"


def _same_seeds(records: Sequence[Record], request: Request) -> Iterator[str]:
    """All variants of an ablation have the same seeds."""
    seeds: dict[tuple[str, str, str], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for r in records:
        if r.workload is None:
            seeds[r.algorithm, r.model, r.reward][r.config_hash].add(r.seed)
    for (algorithm, model, reward), by_hash in sorted(seeds.items()):
        everywhere = set.union(*by_hash.values())
        for config_hash, found in sorted(by_hash.items()):
            if missing := sorted(everywhere - found):
                label = plain(f"{algorithm} on {model} / {reward}, settings {config_hash}")
                yield f"{label}: seeds {_listed(missing)} are missing, which other variants have"


def _beside_published(records: Sequence[Record], request: Request) -> Iterator[str]:
    """It can stand in one table with what is there: a ruleset asks for one commit, device and installation."""
    mine = {(r.ruleset, r.workload) for r in records if r.ruleset}
    beside = [r for r in request.published if (r.ruleset, r.workload) in mine]
    finished = [r for r in (*beside, *records) if r.status == "finished" and r.ruleset]
    if not beside or not finished:
        return
    try:
        for split in sorted({key.split("/")[1] for r in finished for key in r.scores if "/" in key}):
            board(finished, split)
    except UsageError as error:
        yield f"cannot stand beside what is published: {error}"


def _listed(seeds: Sequence[int], most: int = 12) -> str:
    shown = ", ".join(map(str, seeds[:most]))
    return shown + (f" and {len(seeds) - most} more" if len(seeds) > most else "")
