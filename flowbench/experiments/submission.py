"""`flowbench submit`: runs to published results, if they keep to what results must keep to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flowbench.errors import UsageError
from flowbench.experiments.suite import load_suite, suite_names
from flowbench.record import Record, read_records
from flowbench.reporting.escape import plain
from flowbench.reporting.results import files, together


@dataclass(frozen=True)
class Submission:
    """What became of a contribution. faults: a line for each check that failed; written: files that are new."""

    records: tuple[Record, ...]
    faults: tuple[str, ...]
    written: tuple[Path, ...]


def suite_seeds() -> dict[tuple[str | None, str], tuple[int, ...]]:
    """The seeds that the built-in suites ask for, by ruleset and workload."""
    found: dict[tuple[str | None, str], tuple[int, ...]] = {}
    for name in suite_names():
        loaded = load_suite(name)
        for part in loaded.suite.runs:
            for workload in part.workloads:
                found[loaded.suite.ruleset, loaded.workloads[workload].name] = part.seed_list
    return found


def submit(
    places: list[Path], to: Path, *, rehearsal: bool = False, ablation: bool = False, write: bool = True
) -> Submission:
    """Check the records below some places, and publish them below `to` if nothing is wrong.

    Raises UsageError when a place does not exist.
    """
    found = read_records(places)
    there = read_records([to]) if to.exists() else None
    published, broken = (there.records, there.faults) if there else ((), ())
    request = together.Request(suite_seeds(), published, rehearsal, ablation)
    made = files.published(found.records)
    faults = [*map(plain, found.faults), *map(plain, broken), *together.faults_of(found.records, request)]
    faults += [f"{path}: is larger than 25 kB" for path in made.too_large]
    faults += _replaced(to, made.files)
    if faults or not write:
        return Submission(found.records, tuple(faults), ())
    return Submission(found.records, (), tuple(files.write(to, made.files)))


def _replaced(to: Path, made: Mapping[Path, str]) -> list[str]:
    """Published results stay as they are."""
    lines = []
    for path, text in made.items():
        if (to / path).exists() and (to / path).read_bytes() != text.encode():
            lines.append(f"{plain(str(path))}: is published with another result, and is never replaced")
    return lines


def check_published(root: Path, since: str | None = None) -> list[str]:
    """What is wrong with published results: a line each. since: a commit of which nothing may have vanished.

    Raises UsageError when the manifest cannot be read, or the commit is unknown.
    """
    try:
        gone = files.vanished_since(root, since) if since is not None and root.is_dir() else []
        return list(dict.fromkeys([*files.faults_of(root), *gone]))
    except OSError as error:
        raise UsageError(f"'{root}' cannot be read: {error.strerror}") from error
