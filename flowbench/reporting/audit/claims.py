"""The flagship's published claims, each with its test, the runs that it rests on and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from flowbench.evaluation.statistics import Interval
from flowbench.record import Record
from flowbench.reporting.audit.ablations import light_critic_suffices, prevents_collapse, studies
from flowbench.reporting.audit.claim import FLAGSHIP, Claim, Finding
from flowbench.reporting.audit.comparisons import (
    best_alignment,
    costs_more,
    depends,
    generalises,
    keeps_diversity,
)
from flowbench.reporting.columns import NOTHING, interval_text, number
from flowbench.reporting.documents import markdown_rows
from flowbench.reporting.escape import markdown
from flowbench.reporting.leaderboard import Table

HEAD = f"""# What holds of AC-Flow's claims

AC-Flow (arXiv:2510.18072) is the algorithm that flowbench was begun for. Here are the seven things that are claimed
of it, each with the test that decides, and the verdict **on these workloads**: small models, small budgets, and the
only public implementation, which is flowbench's own `{FLAGSHIP}`. A claim is *supported* or *not supported* only where
an interval says so; everything else is *undecided*. Intervals are 95 %. Generated from the records by `flowbench
leaderboard --write`.
"""


def claims(tables: Sequence[Table], records: Sequence[Record]) -> tuple[Claim, ...]:
    """The seven claims. tables: of runs of suites; records: all, the ablations are found among them."""
    ablations = studies(records)
    return (
        best_alignment(tables),
        generalises(tables),
        prevents_collapse(ablations),
        keeps_diversity(tables),
        light_critic_suffices(ablations),
        costs_more(tables),
        depends(tables),
    )


def claims_page(found: Sequence[Claim]) -> str:
    """The page of the claims as Markdown."""
    rows = [[str(k), markdown(c.text), f"**{c.verdict}**", markdown(c.reason)] for k, c in enumerate(found, 1)]
    parts = [HEAD, markdown_rows(["", "claim", "verdict", "why"], rows) + "\n"]
    for k, claim in enumerate(found, 1):
        parts.append(f"## {k}. {markdown(claim.text)}\n")
        parts.append(f"**{claim.verdict.capitalize()}**: {markdown(claim.reason)}.\n")
        parts.append(f"Test: {markdown(claim.test)}\n")
        parts.append(f"Runs: {claim.runs if claim.findings else f'none yet; it takes {claim.runs}'}.\n")
        if claim.findings:
            lines = [[markdown(f.what), _estimate(f), f.says, markdown(f.note) or NOTHING] for f in claim.findings]
            parts.append(markdown_rows(["comparison", "estimate", "says", "note"], lines) + "\n")
    return "\n".join(parts)


def _estimate(finding: Finding) -> str:
    if finding.interval is None:
        return NOTHING
    if finding.unit == "ratio":
        return f"x {_plain_interval(finding.interval)}"
    return interval_text(finding.interval, signed=finding.unit == "gain")


def _plain_interval(found: Interval) -> str:
    if found.low is None or found.high is None:
        return number(found.value)
    return f"{number(found.value)} [{number(found.low)}, {number(found.high)}]"
