"""A published claim and what records say of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from flowbench.evaluation.statistics import Interval

FLAGSHIP = "acflow"
NO_RUNS = "no runs"

Verdict: TypeAlias = Literal["supported", "not supported", "undecided"]
SUPPORTED: Verdict = "supported"
NOT_SUPPORTED: Verdict = "not supported"
UNDECIDED: Verdict = "undecided"


@dataclass(frozen=True)
class Finding:
    """One comparison. what: in words; interval: its estimate; unit: how its numbers are shown; says: of the claim."""

    what: str
    interval: Interval | None
    says: Verdict
    unit: Literal["gain", "share", "ratio", "text"] = "gain"
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """One published claim. test: which comparison and statistic; runs: what it rests on; reason: of the verdict."""

    text: str
    test: str
    runs: str
    findings: tuple[Finding, ...]
    verdict: Verdict
    reason: str


def everywhere(says: Iterable[Verdict]) -> Verdict:
    """Of a claim that must hold in all cases: one counterexample refutes it, and all must speak for it."""
    found = list(says)
    if NOT_SUPPORTED in found:
        return NOT_SUPPORTED
    return SUPPORTED if found and all(verdict == SUPPORTED for verdict in found) else UNDECIDED


def above(found: Interval | None, line: float = 0.0) -> Verdict:
    """Whether a quantity is above a line: its whole interval is, is below, or neither; no interval decides nothing."""
    if found is None or found.low is None or found.high is None:
        return UNDECIDED
    return SUPPORTED if found.low > line else NOT_SUPPORTED if found.high < line else UNDECIDED


def made(
    text: str,
    test: str,
    runs: str,
    findings: Iterable[Finding],
    verdict: Verdict | None = None,
    reason: str | None = None,
) -> Claim:
    """A claim with its verdict, by default that of `everywhere`; without findings it is undecided, for want of runs."""
    there = tuple(findings)
    if not there:
        return Claim(text, test, runs, (), UNDECIDED, NO_RUNS)
    found = verdict or everywhere(finding.says for finding in there)
    if reason is not None:
        return Claim(text, test, runs, there, found, reason)
    count = {v: sum(f.says == v for f in there) for v in (SUPPORTED, NOT_SUPPORTED, UNDECIDED)}
    reason = f"of {len(there)} comparisons {count[SUPPORTED]} speak for it, {count[NOT_SUPPORTED]} against it"
    return Claim(text, test, runs, there, found, reason)
