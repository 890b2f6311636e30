"""The picture of a search: how the best of k trials grows with k, and where in the space the trials stood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbench.algorithm import Choice, Dimension, LogUniform
from flowbench.reporting.style import FULL, Theme, caption, figure, mark, save_variants

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS, ROW = 3, 2.0  # panels in a row, and its height in inches
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
    """Write the picture for light and dark pages, as SVG and PNG; returns the paths."""
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
    return save_variants(stem, build, alt=f"{picture.title}{last}")


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
        axis.set_xticks(range(len(dimension.ends)), [str(value) for value in dimension.ends])
        axis.set_xlim(-0.5, len(dimension.ends) - 0.5)
    else:
        axis.set_xscale("log" if isinstance(dimension, LogUniform) else "linear")
        axis.set_xlim(*dimension.ends)
    axis.set_xlabel(name)
