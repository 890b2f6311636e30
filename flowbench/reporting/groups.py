"""Which records belong together: one table per workload, one row per identity, one record per seed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flowbench.errors import UsageError
from flowbench.escape import plain
from flowbench.record import OWN, PRESET, RANDOM, Record

UNKNOWN = "unknown"
SEARCH, TUNED = "search", "tuned"  # rulesets of runs that searches make; of "tuned" also results
HEX = 7  # digits of a hash that a reader is shown


@dataclass(frozen=True, order=True)
class Workload:
    """What the rows of one table have in common; records that differ in any of it are never compared.

    name, version, ruleset: those of a suite's workload, "" for runs outside of one; images: the budget; prompts,
    weights: digests of the prompt files, and of the weights of model and reward.
    """

    name: str
    version: str
    ruleset: str
    model: str
    reward: str
    images: int
    protocol: str
    prompts: str
    weights: str


@dataclass(frozen=True)
class Group:
    """The runs of one row: the same algorithm and settings, one record per seed, by seed.

    finished: runs with scores on the table's split; failed: runs without a result; label: the row's name, unique in its
    table; settings: what tells it from other rows of its algorithm, "" where it has none.
    """

    algorithm: str
    settings: str
    finished: tuple[Record, ...]
    failed: tuple[Record, ...]

    @property
    def label(self) -> str:
        """The algorithm, with its settings if there are several rows of it."""
        return f"{self.algorithm} ({self.settings})" if self.settings else self.algorithm

    @property
    def records(self) -> tuple[Record, ...]:
        """All runs."""
        return self.finished + self.failed


@dataclass(frozen=True)
class Grouped:
    """The groups of every workload, in order; notes: what a reader should know of all records."""

    workloads: Mapping[Workload, tuple[Group, ...]]
    notes: tuple[str, ...] = ()


@dataclass
class _Found:
    finished: list[Record] = field(default_factory=list)
    failed: list[Record] = field(default_factory=list)


def is_trial(record: Record) -> bool:
    """Whether it is a trial of a search: scored on dev alone, and so in no table."""
    evaluation = record.config.get("evaluation")
    unreported = isinstance(evaluation, dict) and evaluation.get("splits") == []
    return record.ruleset == SEARCH or (record.ruleset == TUNED and unreported)


def group(records: Iterable[Record], split: str) -> Grouped:
    """Sort records into tables and rows; a record that is given twice counts once.

    Records of models with random weights, trials of searches, and records without scores on the split, are left out.
    Under ruleset "tuned" an algorithm's results are one row, whatever settings its studies selected.
    Raises UsageError when nothing is left, and for records of one ruleset's table that mix commits, devices or versions
    or come from a changed source tree.
    """
    known = [record for record in records if not record.model.endswith(RANDOM) and not is_trial(record)]
    if not known:
        raise UsageError("no records found; a finished run leaves one in its folder, see 'flowbench list runs'")
    chosen, notes = _one_per_seed(known)
    finished = [r for r in chosen if r.status == "finished" and any(key.endswith(f"/{split}") for key in r.scores)]
    failed = [r for r in chosen if r.status == "failed"]
    if not finished and not failed:
        there = sorted({key.split("/")[1] for r in known for key in r.scores if "/" in key})
        raise UsageError(f"no record has the split '{split}'; there are: {', '.join(map(plain, there)) or 'none'}")
    found: dict[Workload, dict[str, _Found]] = {}
    for record in finished:
        found.setdefault(_workload(record), {}).setdefault(_row(record), _Found()).finished.append(record)
    for record in failed:
        _place_failed(record, found)
    tables = {workload: _rows(rows) for workload, rows in sorted(found.items(), key=lambda item: item[0])}
    for workload, rows in tables.items():
        if workload.ruleset:
            _check_rules(workload, rows)
    return Grouped(tables, notes)


def _one_per_seed(records: Sequence[Record]) -> tuple[list[Record], tuple[str, ...]]:
    """Of records with one identity and seed the newest, finished before failed; with a note where they differ."""
    by_run: dict[tuple[str, str, int, Workload], list[Record]] = {}
    for r in records:
        by_run.setdefault((r.algorithm, _row(r), r.seed, _workload(r)), []).append(r)
    chosen, repeated = [], []
    for (algorithm, _, seed, _), same in sorted(by_run.items(), key=lambda item: item[0]):
        best = same[0]
        if len(same) > 1:
            best = max(
                same, key=lambda r: (r.status == "finished", r.finished, json.dumps(_results(r), sort_keys=True))
            )
        chosen.append(best)
        if any(_results(r) != _results(best) for r in same):
            repeated.append(f"{plain(algorithm)} seed {seed}")
    if not repeated:
        return chosen, ()
    return chosen, (f"several results of the same run, the newest is shown: {_some(repeated)}",)


def _row(record: Record) -> str:
    """What runs of one row share: all that decides a result, or where each study has a setting the method's code."""
    if record.ruleset != TUNED:
        return record.identity
    foreign = {name: s.sha256 for name, s in record.sources.items() if name != PRESET and s.distribution != OWN}
    return json.dumps([record.algorithm, foreign], sort_keys=True)


def _results(record: Record) -> dict[str, tuple[float, float]]:
    return {key: (s.base, s.tuned) for key, s in record.scores.items()}


def _workload(record: Record) -> Workload:
    training = record.config.get("training")
    budget = training.get("images") if isinstance(training, dict) else None
    evaluation = record.config.get("evaluation")
    splits = evaluation.get("splits") if isinstance(evaluation, dict) else None
    used = {"train", *(splits or record.prompts)}  # and not those that only the points of a run are scored on
    return Workload(
        name=record.workload or "",
        version=record.workload_hash or "",
        ruleset=record.ruleset or "",
        model=record.model,
        reward=record.reward,
        images=budget if isinstance(budget, int) else record.budget.images,
        protocol=record.protocol_hash,
        prompts=_digest({name: digest for name, digest in record.prompt_hashes.items() if name in used}),
        weights=record.weights_key,
    )


def _digest(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True) if content else ""


def _place_failed(record: Record, found: dict[Workload, dict[str, _Found]]) -> None:
    """A run that broke off early may not know its prompts and weights: it joins the row that has its settings."""
    own = _workload(record)

    def fits(other: Workload) -> bool:
        pairs = [(getattr(own, name), getattr(other, name)) for name in Workload.__dataclass_fields__]
        return all(mine == theirs or mine == "" for mine, theirs in pairs)

    tables = [workload for workload in found if fits(workload)]
    for workload in tables:
        for rows in found[workload].values():
            one = (rows.finished or rows.failed)[0]
            same = one.config_hash == record.config_hash or record.ruleset == TUNED
            if same and one.algorithm == record.algorithm:
                rows.failed.append(record)
                return
    table = found.setdefault(tables[0] if tables else own, {})
    table.setdefault(_row(record), _Found()).failed.append(record)


def _rows(found: Mapping[str, _Found]) -> tuple[Group, ...]:
    """The groups of one table, each with what tells it from the others of its algorithm."""
    by_algorithm: dict[str, list[str]] = {}
    for identity, runs in sorted(found.items()):
        by_algorithm.setdefault((runs.finished or runs.failed)[0].algorithm, []).append(identity)
    groups = []
    for algorithm, identities in sorted(by_algorithm.items()):
        first = {i: (found[i].finished or found[i].failed)[0] for i in identities}
        names = differences([first[i].config for i in identities]) if len(identities) > 1 else [""]
        if len(set(names)) < len(names):  # sources or weights differ, and no setting
            names = [", ".join(filter(None, (name, i[:HEX]))) for name, i in zip(names, identities, strict=True)]
        for identity, name in zip(identities, names, strict=True):
            runs = found[identity]
            seeds = {r.seed for r in runs.finished}  # what failed once and finished later has a result
            failed = {r.seed: r for r in runs.failed if r.seed not in seeds}
            done = tuple(sorted(runs.finished, key=lambda r: r.seed))
            groups.append(Group(algorithm, name, done, tuple(failed[seed] for seed in sorted(failed))))
    return _distinct(groups)


def _distinct(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups, numbered where a foreign name is spelt as another's label."""
    counts = Counter(one.label for one in groups)
    return tuple(
        replace(one, settings=f"{one.settings} #{k}".strip()) if counts[one.label] > 1 else one
        for k, one in enumerate(groups)
    )


def differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each configuration the settings in which they differ, such as "training.ema=0.97, algorithm.tau=2".

    A setting that one of them lacks, as configurations of older versions do, counts only where nothing else differs.
    """
    flat = [_flat(config) for config in configs]
    everywhere = [key for key in flat[0] if all(key in other for other in flat)]
    anywhere = dict.fromkeys(key for one in flat for key in one)
    for keys in (everywhere, anywhere):
        differing = [key for key in keys if len({_spell(one.get(key, "unset")) for one in flat}) > 1]
        if differing:
            return [", ".join(f"{key}={_spell(one.get(key, 'unset'))}" for key in differing) for one in flat]
    return [""] * len(configs)


IGNORED = ("seed", "device")
RENAMED = {"hyperparameters": "algorithm"}  # as `--set` has it


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their full names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{RENAMED.get(name, name)}.{key}": inner for key, inner in value.items()}
        elif name not in IGNORED:
            flat[name] = value
    return flat


def _spell(value: Any) -> str:
    return plain(value if isinstance(value, str) else json.dumps(value))


def mixtures(records: Iterable[Record]) -> list[str]:
    """What commits, devices and package versions differ among runs, a line each: "mixed commits: a (3 runs), b (2)"."""
    records = list(records)
    packages = sorted({name for r in records for name in r.versions} - {"flowbench"})  # its commits tell more
    kinds = {
        "commits": [_commit(r.commit) for r in records],
        "devices": [r.device or UNKNOWN for r in records],
        **{package: [r.versions.get(package, UNKNOWN) for r in records] for package in packages},
    }
    mixed = {kind: Counter(values) for kind, values in kinds.items() if len(set(values)) > 1}
    lines = [f"mixed {kind}: {_counted(mixed[kind])}" for kind in ("commits", "devices") if kind in mixed]
    others = [kind for kind in packages if kind in mixed]
    if others:
        told = "torch" if "torch" in others else others[0]
        lines.append(f"mixed versions of {plain(', '.join(others))}; {plain(told)}: {_counted(mixed[told])}")
    return lines


def _counted(counts: Counter[str]) -> str:
    return _some([f"{plain(value)} ({n} run{'s' * (n > 1)})" for value, n in counts.most_common()])


def _commit(commit: str | None) -> str:
    """A commit's first digits, with "+" for a changed tree."""
    return (commit[:HEX] + "+" * commit.endswith("+")) if commit else UNKNOWN


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_rules(workload: Workload, groups: Sequence[Group]) -> None:
    """Rules of a fair comparison: one commit without changes, one kind of device, one set of versions."""
    records = [r for one in groups for r in one.finished]
    faults = mixtures(records)
    changed = sum((r.commit or "").endswith("+") for r in records)
    if changed:
        faults.append(f"{changed} runs of a changed source tree")
    if faults:
        name = plain(workload.name or f"{workload.model}, {workload.reward}")
        raise UsageError(
            f"'{name}' under ruleset '{plain(workload.ruleset)}' has {'; '.join(faults)}; "
            "name folders of one commit, device and installation"
        )
