"""The picture of a search: how the best of k trials grows with k, and where in the space the trials stood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbench.algorithm import Choice, Dimension, LogUniform
from flowbench.reporting.style import DARK, FULL, LIGHT, Theme, caption, figure, mark, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS, ROW = 3, 2.0  # panels in a row, and its height in inches
MOST_LETTERS = 20  # of a panel's choices side by side
CAPTION = (
    "Gain: mean reward on dev at the end of the budget, tuned minus base, of each trial's first run. Circles may be "
    "selected, crosses keep too little diversity; the star is the selected trial."
)


@dataclass(frozen=True)
class SearchPicture:
    """What is drawn. best_of: mean gain of the best of k trials; gains: of each trial that ended in a number, tuned
    minus base; qualifies: whether it may be selected; selected: its place in `gains`; dimensions: by full name, with
    the value of each of those trials.
    """

    algorithm: str
    title: str
    reward: str
    best_of: Sequence[float]
    gains: Sequence[float]
    qualifies: Sequence[bool]
    selected: int | None
    dimensions: Mapping[str, tuple[Dimension, Sequence[Any]]]


def draw_search(stem: Path, picture: SearchPicture) -> list[Path]:
    """Write STEM.svg and STEM-dark.svg, for light and dark pages; returns the paths."""
    panels = 1 + len(picture.dimensions)
    rows = -(-panels // COLUMNS)

    def build(theme: Theme) -> Figure:
        drawn = figure(FULL, ROW * rows + 0.6)
        axes = drawn.subplots(rows, COLUMNS, squeeze=False, sharey=True).flatten().tolist()
        _best_of(axes[0], picture)
        for axis, (name, (dimension, values)) in zip(axes[1:], picture.dimensions.items(), strict=False):
            _scatter(axis, picture, theme, name, dimension, values)
        for axis in axes[panels:]:
            axis.set_visible(False)
        for axis in axes[::COLUMNS]:
            axis.set_ylabel(f"gain in {picture.reward}")
        drawn.suptitle(picture.title)
        caption(drawn, CAPTION)
        return drawn

    last = f"; the best of all gains {picture.best_of[-1]:+.4f}" if picture.best_of else ""
    endings = {".svg": LIGHT, "-dark.svg": DARK}
    alt = f"{picture.title}{last}"
    return [
        save(stem.with_name(stem.name + ending), build, theme, transparent=True, alt=alt)
        for ending, theme in endings.items()
    ]


def _best_of(axis: Axes, picture: SearchPicture) -> None:
    axis.plot(range(1, len(picture.best_of) + 1), picture.best_of, color=mark(picture.algorithm).color, marker=".")
    axis.set_xlabel("best of k trials, mean")


def _scatter(
    axis: Axes, picture: SearchPicture, theme: Theme, name: str, dimension: Dimension, values: Sequence[Any]
) -> None:
    choices, color = isinstance(dimension, Choice), mark(picture.algorithm).color
    places = [dimension.place(value) * (len(dimension.ends) - 1) if choices else value for value in values]
    for qualifies, marker, shade in ((True, "o", color), (False, "x", theme.base)):
        shown = [i for i, may in enumerate(picture.qualifies) if may == qualifies and i != picture.selected]
        axis.scatter([places[i] for i in shown], [picture.gains[i] for i in shown], s=14, marker=marker, color=shade)
    if picture.selected is not None:
        at = picture.selected
        axis.scatter([places[at]], [picture.gains[at]], s=70, marker="*", color=theme.ink, zorder=3)
    if choices:
        names = [str(value) for value in dimension.ends]
        slope: dict[str, Any] = {"rotation": 25, "ha": "right"} if sum(map(len, names)) > MOST_LETTERS else {}
        axis.set_xticks(range(len(names)), names, **slope)
        axis.set_xlim(-0.5, len(dimension.ends) - 0.5)
    else:
        axis.set_xlim(*dimension.ends)
    if isinstance(dimension, LogUniform):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # matplotlib's own needs mathematics
        axis.xaxis.set_minor_formatter("")
        axis.set_xlim(*dimension.ends)
    axis.set_xlabel(name)
