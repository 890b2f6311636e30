"""The picture of a search: how the best of k trials grows with k, and where in the space the trials stood."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbench.algorithm import Choice, Dimension, LogUniform

if TYPE_CHECKING:
    from matplotlib.axes import Axes

os.environ.setdefault("MPLBACKEND", "Agg")

WIDTH, HEIGHT, FONT = 7.0, 2.1, 9  # inches of the figure, and of a row of panels
COLUMNS = 3
DONE, LOST, SELECTED = "#56B4E9", "#999999", "#D55E00"  # Okabe and Ito's sky blue and vermilion, and a grey


@dataclass(frozen=True)
class SearchPicture:
    """What is drawn. best_of: mean gain of the best of k trials; gains: of each trial that ended in a number, tuned
    minus base; qualifies: whether it may be selected; selected: its place in `gains`; dimensions: by full name, with
    the value of each of those trials.
    """

    title: str
    reward: str
    best_of: Sequence[float]
    gains: Sequence[float]
    qualifies: Sequence[bool]
    selected: int | None
    dimensions: Mapping[str, tuple[Dimension, Sequence[Any]]]


def draw_search(path: Path, picture: SearchPicture) -> None:
    """Write the picture as PNG and, beside it, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = 1 + len(picture.dimensions)
    rows = -(-panels // COLUMNS)
    with matplotlib.rc_context({"font.size": FONT, "axes.titlesize": FONT, "svg.hashsalt": "flowbench"}):
        figure = Figure(figsize=(WIDTH, HEIGHT * rows + 0.4), layout="constrained")
        axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten().tolist()
        _best_of(axes[0], picture)
        for axis, (name, (dimension, values)) in zip(axes[1:], picture.dimensions.items(), strict=False):
            _scatter(axis, picture, name, dimension, values)
        for axis in axes[panels:]:
            axis.set_visible(False)
        figure.suptitle(picture.title, fontsize=FONT, parse_math=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _best_of(axis: Axes, picture: SearchPicture) -> None:
    axis.plot(range(1, len(picture.best_of) + 1), picture.best_of, color=SELECTED, marker=".")
    axis.set(xlabel="trials k", ylabel=f"gain in {picture.reward} (dev)", title="best of k, in the mean")
    axis.grid(alpha=0.3)


def _scatter(axis: Axes, picture: SearchPicture, name: str, dimension: Dimension, values: Sequence[Any]) -> None:
    choices = isinstance(dimension, Choice)
    places = [dimension.place(value) * (len(dimension.ends) - 1) if choices else value for value in values]
    marks = {True: ("o", DONE), False: ("x", LOST)}
    for kind, (marker, color) in marks.items():
        chosen = [i for i, qualifies in enumerate(picture.qualifies) if qualifies == kind and i != picture.selected]
        axis.scatter([places[i] for i in chosen], [picture.gains[i] for i in chosen], s=14, marker=marker, color=color)
    if picture.selected is not None:
        at = picture.selected
        axis.scatter([places[at]], [picture.gains[at]], s=40, marker="*", color=SELECTED, zorder=3)
    if choices:
        axis.set_xticks(range(len(dimension.ends)), [str(value) for value in dimension.ends], parse_math=False)
        axis.set_xlim(-0.5, len(dimension.ends) - 0.5)
    elif isinstance(dimension, LogUniform):
        axis.set_xscale("log")
        axis.set_xlim(*dimension.ends)
    axis.set_xlabel(name, parse_math=False)
    axis.grid(alpha=0.3)
