"""The page on over-optimisation as Markdown, and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowbench.evaluation.statistics import Interval
from flowbench.reporting import style
from flowbench.reporting.audit.judges import Judge, judges
from flowbench.reporting.audit.optimisation import Path as Way
from flowbench.reporting.audit.optimisation import Step, paths
from flowbench.reporting.columns import NOTHING, interval_text
from flowbench.reporting.documents import markdown_rows
from flowbench.reporting.escape import markdown
from flowbench.reporting.leaderboard import Board, Table
from flowbench.reporting.words import titles
from flowbench.terms import path_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAD = """# Over-optimisation

Whether the images get better while the reward rises, and whether a judge that was not trained on would have noticed.
All scores are on split `dev`, tuned minus base, at the points of the budget; intervals are 95 % over seeds. Generated
from the records by `flowbench leaderboard --write`.
"""

NOTHING_KNOWN = (
    "No published run has both a known truth that it was not trained on and points of its budget: there is nothing to "
    "say yet.\n"
)

LEGEND = """- **truth peaks at**: images after which a run's truth is largest, mean over seeds; a rough place, since
  single points are noisy.
- **lost**: truth at the point where the *other* seeds' mean truth is largest, minus truth at the end. Above 0, and its
  interval too, the method over-optimised: it went on, and the images got worse.
- **kept by stopping**: truth at the point that the held-out judges rank highest in the mean, minus truth at the end.
  They and the truth see the same images, so that this is a little too good.
- diversity is a share of the base model's.
"""

OVER_TRAINING = "Over training, by images generated: truth / reward trained on / distance, means over seeds.\n"

JUDGES_LEGEND = (
    "Kendall's tau with the truth over all points of all runs; intervals are over methods, since the runs of one "
    "resemble each other. \\* the reward trained on, which is no judge.\n"
)


def over_optimisation(board: Board, images: str = "images") -> str:
    """The page. images: folder of the pictures, relative to the page."""
    parts = [HEAD]
    for title, table in zip(titles(board), board.tables, strict=True):
        found = paths(table)
        if found:
            parts += [f"## {markdown(title)}\n", *_section(table, found, images)]
    return "\n".join(parts if len(parts) > 1 else [HEAD, NOTHING_KNOWN])


def _section(table: Table, found: Sequence[Way], images: str) -> list[str]:
    ends, choices = ("reward", "truth", "distance", "diversity"), ("truth peaks at", "lost", "kept by stopping")
    headings = ("algorithm", "seeds", *ends, *choices)
    rows = [[markdown(path.label), f"{path.seeds}", *_end(path.end), *_choices(path)] for path in found]
    said = [_verdict(found), markdown_rows(headings, rows), LEGEND]
    said += [OVER_TRAINING, _over_training(found)]
    said.append(f"![Truth against the reward trained on, over training]({images}/{picture_name(table)}.svg)\n")
    if ranked := judges(table):
        said += ["### Judges\n", markdown_rows(("judge", "tau", "checkpoints"), _ranked(ranked)), JUDGES_LEGEND]
    return [text if text.endswith("\n") else f"{text}\n" for text in said]


def _over_training(found: Sequence[Way]) -> str:
    """What the picture draws, as a table."""
    places = sorted({step.images for path in found for step in path.steps if step.images})
    rows = []
    for path in found:
        there = {step.images: step for step in path.steps}
        rows.append([markdown(path.label), *(_three(there[k]) if k in there else NOTHING for k in places)])
    return markdown_rows(["algorithm", *(f"{k:,}" for k in places)], rows)


def _three(step: Step) -> str:
    numbers = ((step.truth, True), (step.proxy, True), (step.distance, False))
    return " / ".join(interval_text(value, "bare", signed) for value, signed in numbers)


def _verdict(found: Sequence[Way]) -> str:
    fell = [markdown(path.label) for path in found if path.over_optimised]
    if fell:
        return f"Over-optimised beyond the noise of seeds (each tested by itself): {', '.join(fell)}."
    if all(path.lost is None or path.lost.low is None for path in found):
        return "With single seeds it cannot be told whether a method over-optimised."
    return "No method lost truth beyond the noise of seeds."


def _end(step: Step) -> list[str]:
    signed = [interval_text(value) for value in (step.proxy, step.truth)]
    distance = interval_text(step.distance, signed=False)
    return [*signed, distance, f"x {interval_text(step.diversity, signed=False)}" if step.diversity else NOTHING]


def _choices(path: Way) -> list[str]:
    return [_images(path.peak), interval_text(path.lost), interval_text(path.kept)]


def _images(found: Interval | None) -> str:
    if found is None:
        return NOTHING
    ends = "" if found.low is None or found.high is None else f" [{found.low:,.0f}, {found.high:,.0f}]"
    return f"{found.value:,.0f}{ends}"


def _ranked(ranked: Sequence[Judge]) -> list[list[str]]:
    rows = []
    for judge in ranked:
        c = judge.correlation
        ends = "" if c.low is None or c.high is None else f" [{c.low:+.2f}, {c.high:+.2f}]"
        rows.append([markdown(judge.name) + r"\*" * judge.trained, f"{c.value:+.2f}{ends}", f"{c.checkpoints}"])
    return rows


def picture_name(table: Table) -> str:
    """The stem of a table's picture."""
    w = table.workload
    return path_name(f"over-optimisation-{w.name or f'{w.model}-{w.reward}'}-{w.ruleset or 'runs'}")


def draw(board: Board, folder: Path) -> list[Path]:
    """The pictures of the page below a folder: STEM.svg, STEM.png and their dark variants; returns what was written."""
    written = []
    for table, title in zip(board.tables, titles(board), strict=True):
        if found := paths(table):
            written += _picture(folder / picture_name(table), found, title)
    return written


def _picture(stem: Path, found: Sequence[Way], title: str) -> list[Path]:
    def build(theme: style.Theme) -> Figure:
        drawn = style.figure(style.FULL, 3.6)
        left, right = drawn.subplots(1, 2, sharey=True)
        for path in found:
            _line(left, path, "proxy", theme)
            _line(right, path, "distance", theme)
        left.set(xlabel="gain in the reward trained on", ylabel="gain in truth: share correct")
        right.set(xlabel="distance from the base model, w2 (or KL, nats)")
        for axis in (left, right):
            axis.axhline(0, color=theme.base, linewidth=0.8)
        handles, labels = left.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside upper center", ncols=6)
        seeds = sorted({path.seeds for path in found})
        told = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        style.caption(
            drawn, f"Means over {told} seeds at the points of the budget on split dev, from the base model (0) on."
        )
        return drawn

    return style.save_variants(stem, build, alt=f"Truth against the reward trained on and distance: {title}")


def _line(axis: Axes, path: Way, across: str, theme: style.Theme) -> None:
    points = [(getattr(step, across), step.truth) for step in path.steps]
    known = [(x.value, y.value) for x, y in points if x is not None and y is not None]
    if not known:
        return
    look = style.mark(path.algorithm)
    axis.plot(
        *zip(*known, strict=True),
        label=style.wrap(path.label, 18, lines=1),
        color=look.color,
        linestyle=look.dashes,
        marker=look.marker,
    )
