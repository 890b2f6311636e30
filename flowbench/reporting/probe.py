"""The table and the picture of `flowbench probe`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowbench.escape import markdown, plain
from flowbench.evaluation.directions import Estimate
from flowbench.reporting import style
from flowbench.reporting.documents import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flowbench.experiments.probe import Probed, ProbeReport

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
    return f"{markdown_table(HEADINGS, [cells(row) for row in report.rows])}\n\n{markdown(legend(report))}\n"


def picture(path: Path, report: ProbeReport) -> None:
    """Three panels with a line per algorithm: projection, cosine, and drift; with their intervals."""
    rows = [row for row in report.rows if row.worth][::-1]
    titles = (
        "projection of one batch",
        "cosine of mean update\nand true gradient",
        "share of the update\nthat is drift",
    )

    def build(theme: style.Theme) -> Figure:
        figure = style.figure(style.FULL, 1.6 + 0.24 * len(rows))
        axes = figure.subplots(1, 3, sharey=True)
        for axis, title, name in zip(axes, titles, ("projection", "cosine", "drift"), strict=True):
            _panel(axis, theme, [(row.algorithm, getattr(row.worth, name)) for row in rows])
            axis.set_title(title)
        axes[0].set_yticks(range(len(rows)), [plain(row.algorithm) for row in rows])
        axes[1].set_xlim(-1.05, 1.05)
        axes[2].set_xlim(-0.05, 1.05)
        figure.suptitle(plain(f"{report.model}, reward {report.reward}"))
        style.caption(figure, "Lines: 95 % bootstrap intervals over batches and parts.")
        return figure

    style.save(path, build, alt=legend(report))


def _panel(axis: Axes, theme: style.Theme, estimates: Sequence[tuple[str, Estimate | None]]) -> None:
    axis.axvline(0, color=theme.base, linewidth=0.8)
    for place, (algorithm, estimate) in enumerate(estimates):
        if estimate is None or estimate.value is None:
            continue
        look = style.mark(algorithm)
        if estimate.low is not None and estimate.high is not None:
            axis.plot((estimate.low, estimate.high), (place, place), color=look.color)
        axis.plot(estimate.value, place, look.marker, color=look.color)
