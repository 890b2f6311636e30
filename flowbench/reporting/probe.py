"""The table and the picture of `flowbench probe`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowbench.evaluation.directions import Estimate

if TYPE_CHECKING:
    from flowbench.experiments.probe import Probed, ProbeReport

os.environ.setdefault("MPLBACKEND", "Agg")

HEADINGS = ("algorithm", "tuned", "images", "projection", "per 1000 images", "cosine", "bias", "noise", "drift")


def cells(row: Probed) -> tuple[str, ...]:
    """A row's texts, in the order of HEADINGS; of a failed one the first two and the reason."""
    found = row.worth
    if found is None:
        return (row.algorithm, row.tuning, f"failed: {row.failure}", *[""] * (len(HEADINGS) - 3))
    warmup = f" + {row.warmup_images}" if row.warmup_images else ""
    return (
        row.algorithm,
        row.tuning,
        f"{row.batches} x {found.images}{warmup}",
        _interval(found.projection, "+.3g"),
        f"{1000 * found.projection_per_image:+.2g}",
        _interval(found.cosine, "+.2f"),
        _interval(found.bias, ".2f"),
        _interval(found.noise, ".0f"),
        "does not apply" if found.drift is None else _interval(found.drift, ".2f"),
    )


def _interval(estimate: Estimate, form: str) -> str:
    value, low, high = ("?" if x is None else f"{x:{form}}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def legend(report: ProbeReport) -> str:
    """What the numbers were measured with."""
    truths = {row.tuning: row.truth for row in report.rows if row.truth}
    how = ", ".join(
        f"{kind} tuning: {f'{t.images} images in {t.parts} parts' if t.images else 'exact'}"
        for kind, t in truths.items()
    )
    return (
        f"{report.model}, reward {report.reward}, weights: {report.weights}, seed {report.seed}; true gradient through "
        f"the {report.sampler} sampler ({how}). Intervals are 95 % bootstrap intervals over batches and parts."
    )


def to_markdown(report: ProbeReport) -> str:
    """The table and its legend."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *map(cells, report.rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\n{legend(report)}\n"


def picture(path: Path, report: ProbeReport) -> None:
    """Three panels with a line per algorithm: projection, cosine, and drift; with their intervals."""
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.worth][::-1]
    figure = Figure(figsize=(11.0, 1.4 + 0.3 * len(rows)), dpi=110, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    titles = (
        "projection of one batch",
        "cosine of the mean update and the true gradient",
        "share of the update that is drift",
    )
    for axis, title, name in zip(axes, titles, ("projection", "cosine", "drift"), strict=True):
        _panel(axis, [getattr(row.worth, name) for row in rows])
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [row.algorithm for row in rows])
    axes[1].set_xlim(-1.05, 1.05)
    axes[2].set_xlim(-0.05, 1.05)
    figure.suptitle(f"{report.model}, reward {report.reward}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(axis, estimates: Sequence[Estimate | None]) -> None:  # type: ignore[no-untyped-def]
    axis.axvline(0, color="tab:gray", linewidth=0.8)
    for place, estimate in enumerate(estimates):
        if estimate is None or estimate.value is None:
            continue
        if estimate.low is not None and estimate.high is not None:
            axis.plot((estimate.low, estimate.high), (place, place), color="tab:blue", alpha=0.5)
        axis.plot(estimate.value, place, "o", color="tab:blue")
