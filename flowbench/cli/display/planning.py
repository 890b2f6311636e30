"""What the command line prints of a run's memory and time, with rich."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flowbench.cli.display.console import console
from flowbench.escape import terminal as escape
from flowbench.experiments.planning.plan import GIB, Plan, usable


def show(plan: Plan) -> None:
    """Two tables: the phases with their memory, and what the work is spent on."""
    console.print(_memory(plan))
    peak = plan.peak
    line = f"peak {peak.peak / GIB:.1f} GiB of tensors in phase '{peak.name}'"
    if plan.limit is not None:
        line += f"; of {plan.limit / GIB:g} GiB {usable(plan.limit) / GIB:.1f} are usable beside context and fragments"
    console.print(escape(line), highlight=False, soft_wrap=True)
    d = plan.division
    console.print(
        f"at a time: {d.rollout} images of a rollout, {d.decode} decoded or scored, {d.microbatch} rows of an update, "
        f"{d.evaluation} images of an evaluation; rewards {'only there to score' if d.offload else 'always there'}"
        + ("; decoding and scoring beside the rollout" if d.overlap else ""),
        highlight=False,
        soft_wrap=True,
    )
    console.print(_costs(plan))
    console.print(
        escape(f"{_time(plan.seconds)} at {plan.tflops:g} TFLOP/s ({plan.rate}); computed, not measured"),
        highlight=False,
        soft_wrap=True,
    )


def _memory(plan: Plan) -> Table:
    table = _table("memory of each phase, GiB", ("phase", "resident", "", "slice", "", "peak"))
    for phase in plan.phases:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in phase.resident.items())
        resident = sum(phase.resident.values()) / GIB
        peak = f"{phase.peak / GIB:.1f}"
        told = (phase.name, f"{resident:.1f}", parts, f"{phase.slice / GIB:.1f}", phase.detail, peak)
        table.add_row(*map(escape, told))
    return table


def _costs(plan: Plan) -> Table:
    table = _table("cost of the whole run", ("purpose", "number", "evaluations", "PFLOP", "time"))
    for cost in plan.costs:
        shared = not cost.flops
        table.add_row(
            escape(cost.purpose),
            f"{cost.number:,}",
            f"{cost.evaluations:,}" if cost.evaluations else "",
            "" if shared else f"{cost.flops / 1e15:,.2f}",
            "" if shared else _time(cost.seconds),
        )
    return table


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        words = heading in ("phase", "purpose", "")
        table.add_column(heading, justify="left" if words else "right", no_wrap=heading != "")
    return table


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
