"""The claims that rest on suites: the flagship beside other methods, its judges, diversity, cost, and workloads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from flowbench.evaluation.statistics import Interval, difference, gains_from_records
from flowbench.evaluation.statistics.targets import FLOOR
from flowbench.record import Record
from flowbench.reporting.audit.claim import (
    FLAGSHIP,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    Claim,
    Finding,
    Verdict,
    above,
    everywhere,
    made,
)
from flowbench.reporting.groups import Group
from flowbench.reporting.leaderboard import HELD_OUT, TRUTH, Row, Table, over_seeds
from flowbench.reporting.targets import DIVERSITY

SAME = 0.02  # a difference in truth below which two workloads count as the same
CRITIC_FREE = ("orw-cfm-w2", "raft", "adrpo", "awm", "nft")  # the forward-process methods without a critic
SUITES = "runs of suites: ruleset defaults, and tuned where there are any"


def best_alignment(tables: Sequence[Table]) -> Claim:
    """1: it aligns better than every other method."""
    return made(
        "It reaches the best alignment.",
        "Its place by truth (where the truth is unknown, by the reward trained on) among all methods of a workload: "
        "supported if it has the first place alone, not supported if it is not even among those that share it "
        "(comparisons with the best, 5 %). Shown is its difference from the best other method.",
        SUITES,
        (f for table in tables for f in _place(table)),
    )


def _place(table: Table) -> Iterator[Finding]:
    row, ranking = _flagship(table), table.ranking
    if row is None or row.standing is None or ranking is None or len(ranking.standings) < 2:
        return
    other = next(s.algorithm for s in ranking.standings if s.algorithm != row.label)
    says: Verdict = UNDECIDED
    if all(s.gain.low is not None for s in ranking.standings):  # a single seed shares the first place, whatever it is
        alone = ranking.first == (row.label,)
        says = SUPPORTED if alone else UNDECIDED if row.label in ranking.first else NOT_SUPPORTED
    gains = table.gains[str(table.by)]
    paired = bool(gains.paired(row.label, other).shape[1])
    found = difference(gains, row.label, other, ranking.over) if paired else None
    shared = f"{len(ranking.first)} share the first place" if len(ranking.first) > 1 else f"first: {ranking.first[0]}"
    yield Finding(f"{_name(table)}: {FLAGSHIP} minus {other}, {table.by}", found, says, note=shared)


def generalises(tables: Sequence[Table]) -> Claim:
    """2: what it learned from one reward shows in preference models that it has not seen."""
    return made(
        "It generalises to preference models that it has not seen.",
        "Gain of the mean of the judges that were not trained on, and of each of them: supported if the mean's "
        "interval is above 0 on every workload, not supported if the mean or a single judge falls below 0.",
        SUITES,
        (f for table in tables for f in _judged(table)),
    )


def _judged(table: Table) -> Iterator[Finding]:
    row = _flagship(table)
    if row is None or HELD_OUT not in row.gains:
        return
    judges = sorted(set.intersection(*({*r.judges} for r in row.group.finished)) & row.gains.keys())
    below = [j for j in judges if above(row.gains[j]) == NOT_SUPPORTED]
    says = NOT_SUPPORTED if below else above(row.gains[HELD_OUT])
    note = f"below 0: {', '.join(below)}" if below else f"{len(judges)} judges"
    yield Finding(f"{_name(table)}: mean of held-out judges", row.gains[HELD_OUT], says, note=note)


def keeps_diversity(tables: Sequence[Table]) -> Claim:
    """4: images of one prompt stay as different as the base model's."""
    findings = []
    for table in tables:
        row = _flagship(table)
        kept = row.retained.get(DIVERSITY) if row else None
        if kept is not None:
            findings.append(Finding(f"{_name(table)}: diversity", kept, above(kept, FLOOR), "share"))
    return made(
        "It keeps the base model's diversity.",
        f"Diversity within prompts as a share of the base model's, against the rules' floor of {FLOOR}: supported if "
        "the interval is above it on every workload, not supported if it is below it on one.",
        SUITES,
        findings,
    )


def costs_more(tables: Sequence[Table]) -> Claim:
    """6: its critic makes it dearer than baselines that are simpler."""
    return made(
        "It costs more than simpler baselines.",
        "Seconds of training on the same device, as a ratio to each forward-process method without a critic, seed by "
        "seed (geometric mean, Student's t on the logarithm): supported if it is above 1 for every one of them, not "
        "supported if it is below 1 for one.",
        SUITES,
        (f for table in tables for f in _ratios(table)),
    )


def _ratios(table: Table) -> Iterator[Finding]:
    mine = _flagship(table)
    for row in table.rows:
        if mine is None or row.algorithm not in CRITIC_FREE:
            continue
        own, other = ({r.seed: r.budget.seconds for r in one.group.finished} for one in (mine, row))
        both = [s for s in sorted(own.keys() & other.keys()) if min(own[s], other[s]) > 0]
        if not both:
            continue
        found = over_seeds([math.log(own[s] / other[s]) for s in both])
        low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
        ratio = Interval(math.exp(found.value), low, high, found.over, found.seeds, found.prompts)
        yield Finding(f"{_name(table)}: seconds, {FLAGSHIP} over {row.label}", ratio, above(ratio, 1.0), "ratio")


def depends(tables: Sequence[Table]) -> Claim:
    """7: what it reaches depends on the reference model and on the reward model."""
    rewards, references = _differences(tables, "reward"), _differences(tables, "model")
    parts = [_any_differs(rewards), _any_differs(references)]
    verdict = everywhere(parts)
    claim = made(
        "What it reaches depends on the reference model and on the reward model.",
        f"Gain in truth between workloads that differ in the reward alone, and in the model alone, paired by seed and "
        f"prompt, Bonferroni over the pairs: supported if some pair of each kind differs, not supported if all pairs "
        f"of a kind are the same to {SAME}. The reference must be varied by workloads on a second model.",
        SUITES,
        [*rewards, *references],
        verdict,
    )
    missing = [kind for kind, found in (("rewards", rewards), ("references", references)) if not found]
    if not missing or not claim.findings:
        return claim
    reason = f"{claim.reason}; {' and '.join(missing)}: no runs"
    return Claim(claim.text, claim.test, claim.runs, claim.findings, claim.verdict, reason)


def _any_differs(found: Sequence[Finding]) -> Verdict:
    says = [finding.says for finding in found]
    if SUPPORTED in says:
        return SUPPORTED
    return NOT_SUPPORTED if says and all(s == NOT_SUPPORTED for s in says) else UNDECIDED


def _differences(tables: Sequence[Table], varied: str) -> list[Finding]:
    """The flagship's gains in truth on pairs of workloads that differ in this alone."""
    known = [(table, row) for table in tables if (row := _flagship(table)) and TRUTH in table.gains]
    pairs = [(a, b) for a, b in combinations(known, 2) if _same_but(a[0], b[0], varied)]
    level = 1 - 0.05 / max(len(pairs), 1)
    findings = []
    for (one, mine), (other, theirs) in pairs:
        found = _difference(_name(one), mine.group, _name(other), theirs.group, one.split, level)
        if found is not None:
            what = f"{_name(one)} minus {_name(other)}, {TRUTH} (the {varied} differs)"
            findings.append(Finding(what, found, _apart(found)))
    return findings


def _same_but(one: Table, other: Table, varied: str) -> bool:
    a, b = one.workload, other.workload
    alike = {"reward", "model"} - {varied}
    same = all(getattr(a, name) == getattr(b, name) for name in (*alike, "ruleset", "images"))
    return same and one.split == other.split and getattr(a, varied) != getattr(b, varied)


def _difference(one: str, mine: Group, other: str, theirs: Group, split: str, level: float) -> Interval | None:
    """By prompt where both have the same prompts; seeds that both have finished."""
    places = {id(r): name for name, group in ((one, mine), (other, theirs)) for r in group.finished}
    records: list[Record] = [*mine.finished, *theirs.finished]
    texts = {tuple(r.prompts.get(split, ())) for r in records}
    if len(texts) != 1 or not all(f"{TRUTH}/{split}" in r.per_prompt for r in records):
        return None
    gains = gains_from_records(records, TRUTH, split, label=lambda record: places[id(record)])
    return difference(gains, one, other, level=level) if gains.paired(one, other).shape[1] else None


def _apart(found: Interval) -> Verdict:
    """Whether two workloads differ; the same if the interval is within `SAME`."""
    if found.low is None or found.high is None:
        return UNDECIDED
    if found.low > 0 or found.high < 0:
        return SUPPORTED
    return NOT_SUPPORTED if np.abs([found.low, found.high]).max() <= SAME else UNDECIDED


def _flagship(table: Table) -> Row | None:
    """Its row, if it has one setting and a finished run."""
    rows = [row for row in table.rows if row.algorithm == FLAGSHIP and row.seeds]
    return rows[0] if len(rows) == 1 else None


def _name(table: Table) -> str:
    w = table.workload
    name = w.name or f"{w.model} / {w.reward}"
    return f"{name} ({w.ruleset})" if w.ruleset and w.ruleset != "defaults" else name
