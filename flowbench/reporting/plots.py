"""Pictures of a run: learning curves, every logged metric, grids of samples; and the curves of an ablation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowbench.escape import plain
from flowbench.names import path_name
from flowbench.record import Point
from flowbench.reporting import style
from flowbench.reporting.meanings import meaning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUTH = "oracle_exact"
DEV_METRICS = (TRUTH, "diversity", "w2", "kl")  # at the points, beside the reward
TITLES = {
    TRUTH: "truth: share correct",
    "diversity": "diversity",
    "w2": "distance from the base, w2",
    "kl": "KL (nats)",
}
COLUMNS = 3  # of the sheet of metrics
IMAGES = "images generated"


@dataclass(frozen=True)
class Curve:
    """One logged quantity of a variant's runs over the images generated (T,).

    values (seeds, T), NaN where it was not logged.
    """

    images: np.ndarray
    values: np.ndarray

    def thirds(self) -> tuple[float, float, float]:
        """Means over seeds of the first, middle and last third of training; NaN where nothing was logged."""
        parts = [part[np.isfinite(part)] for part in np.array_split(self.values, 3, axis=1)]
        first, middle, last = (float(part.mean()) if part.size else float("nan") for part in parts)
        return first, middle, last


def sample_grid(path: Path, columns: dict[str, torch.Tensor], prompts: list[str]) -> None:
    """Rows of prompts; under each column's title that model's images (P, n, 3, H, W) in [0, 1]."""
    rows, n, _, height, width = next(iter(columns.values())).shape

    def build(theme: style.Theme) -> Figure:
        size = (style.FULL - 1.8) / max(len(columns) * n, 4)
        figure = style.figure(style.FULL, rows * (size * height / width + 0.02) + 0.4)
        axes = figure.subplots(1, len(columns), squeeze=False)[0]
        for axis, (title, images) in zip(axes, columns.items(), strict=True):
            padded = np.ones((rows, n, height + 2, width + 2, 3), dtype=np.float32)
            padded[:, :, 1:-1, 1:-1] = images.clamp(0, 1).permute(0, 1, 3, 4, 2).numpy()
            mosaic = padded.transpose(0, 2, 1, 3, 4).reshape(rows * (height + 2), n * (width + 2), 3)
            axis.imshow(mosaic, interpolation="nearest")
            axis.set_title(plain(title))
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.grid(False)
        axes[0].set_yticks([(r + 0.5) * (height + 2) for r in range(rows)], [style.wrap(p, 26) for p in prompts])
        axes[0].tick_params(length=0)
        return figure

    style.save(path, build, alt="; ".join(prompts))


def learning_curves(
    path: Path,
    lines: list[dict[str, Any]],
    title: str,
    reward: str = "reward",
    base: Mapping[str, float] = MappingProxyType({}),
    points: Sequence[Point] = (),
    algorithm: str | None = None,
) -> None:
    """What a run learned, over images: scores on `dev` at the points of its budget, and thin behind them training's.

    reward: what is trained on; base, points: the base model's scores on dev, and those on the way; without points the
    means over the images trained on, smoothed, stand alone. Beside `path` go an SVG of the same and metrics.png, a
    sheet with every metric that the algorithm logs and its meaning.
    """
    if not lines:
        return
    name = path_name(reward)
    seen = np.array([line["images"] for line in lines])
    behind = {name: (seen, np.array([line["reward"] for line in lines])), TRUTH: _logged(lines, TRUTH)}
    scored = {metric for point in points for metric in point.scores}
    known = dict.fromkeys((name, *DEV_METRICS))
    panels = [m for m in known if m in scored or (m in behind and behind[m][1].size)]

    def build(theme: style.Theme) -> Figure:
        columns = min(2, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = style.figure(style.FULL if columns > 1 else style.HALF, 2.2 * rows + 0.6)
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for axis, metric in zip(axes, panels, strict=False):
            _panel(axis, theme, metric, behind.get(metric), base, points, algorithm)
            axis.set_ylabel(TITLES.get(metric, f"reward: {style.wrap(metric, 24)}"))
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis in axes[max(0, len(panels) - columns) : len(panels)]:
            axis.set_xlabel(IMAGES)
            axis.tick_params(labelbottom=True)
        figure.suptitle(plain(title))
        style.caption(figure, _said_of(points))
        return figure

    style.save(path, build, alt=title, also="svg")
    _metric_sheet(path.with_name("metrics.png"), lines, title, algorithm)


def _said_of(points: Sequence[Point]) -> str:
    if not points:
        return "Thin: means over the images trained on, by iteration. Thick: their moving average."
    return (
        "Dots: the averaged policy on split dev, means over its prompts. Grey line: the base model. "
        "Thin: means over the images trained on, by iteration."
    )


def _panel(
    axis: Axes,
    theme: style.Theme,
    metric: str,
    behind: tuple[np.ndarray, np.ndarray] | None,
    base: Mapping[str, float],
    points: Sequence[Point],
    algorithm: str | None,
) -> None:
    """One metric: dots on dev from the base model on, and thin behind them what training saw."""
    look = style.mark(algorithm or "")
    color = theme.truth if metric == TRUTH else look.color
    if behind is not None and behind[1].size:
        axis.plot(*behind, color=color, alpha=0.35, linewidth=0.6)
        if not points:
            axis.plot(behind[0], _smooth(behind[1]), color=color)
    known = [(point.images, point.scores[metric]) for point in points if metric in point.scores]
    if metric in base:
        axis.axhline(base[metric], color=theme.base, linewidth=0.8)
        known = [(0, base[metric]), *known]
    if known:
        axis.plot(*zip(*known, strict=True), color=color, marker=look.marker)


def _metric_sheet(path: Path, lines: list[dict[str, Any]], title: str, algorithm: str | None) -> None:
    """Every metric of the log in a panel of its own, under its name and what it means."""
    names = list(dict.fromkeys(m for line in lines for m in line["metrics"]))
    if not names:
        return

    def build(theme: style.Theme) -> Figure:
        rows = math.ceil(len(names) / COLUMNS)
        height = 1.8 * rows + 0.7
        figure = style.figure(style.FULL, height, fitted=False)  # so many labels take seconds to fit
        top, bottom = 1 - 0.8 / height, 0.55 / height
        axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
        figure.subplots_adjust(left=0.08, right=0.98, top=top, bottom=bottom, hspace=0.75, wspace=0.32)
        for axis, metric in zip(axes, names, strict=False):
            axis.plot(*_logged(lines, metric), color=theme.ink, linewidth=0.8)
            named = [style.wrap(metric, 30, lines=1), style.wrap(meaning(metric, algorithm), 40)]
            axis.set_title("\n".join(filter(None, named)))
            axis.title.set_fontsize(style.TEXT - 2)
            axis.tick_params(labelsize=style.TEXT - 2)
            axis.locator_params(nbins=4)
        for axis in axes[len(names) :]:
            axis.set_visible(False)
        figure.suptitle(plain(title))
        style.caption(figure, f"Across: {IMAGES}. Means over each iteration.")
        return figure

    style.save(path, build, alt=f"{title}: {', '.join(names)}")


def _logged(lines: list[dict[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and values where a metric was logged."""
    points = [(line["images"], line["metrics"][metric]) for line in lines if metric in line["metrics"]]
    return np.array([i for i, _ in points]), np.array([value for _, value in points])


def ablation_curves(path: Path, variants: Mapping[str, Mapping[str, Curve]], title: str) -> None:
    """Each quantity in a panel of its own: per variant the mean over seeds, and the seeds' range as a band."""
    names = list(dict.fromkeys(name for curves in variants.values() for name in curves))
    seeds = max((curve.values.shape[0] for curves in variants.values() for curve in curves.values()), default=0)

    def build(theme: style.Theme) -> Figure:
        columns = min(2, len(names)) or 1
        rows = math.ceil(len(names) / columns)
        figure = style.figure(style.FULL, 2.3 * rows + 0.9)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, name in zip(axes, names, strict=False):
            ends, colors = {}, {}
            for place, (variant, curves) in enumerate(variants.items()):
                if name not in curves or not np.isfinite(curves[name].values).any():
                    continue
                look = style.variant_mark(place, theme)
                ends[variant], colors[variant] = _variant(axis, curves[name], look, variant), look.color
            axis.set(ylabel=plain(name.replace("_", " ")), xlabel=IMAGES)
            if name.startswith("explained_variance"):
                axis.set_ylim(bottom=max(axis.get_ylim()[0], -1.0))  # an untrained critic can be arbitrarily bad
            if len(variants) <= style.DIRECT_LABELS:
                style.label_lines(axis, ends, colors)
        for axis in axes[len(names) :]:
            axis.set_visible(False)
        if len(variants) > style.DIRECT_LABELS:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        figure.suptitle(plain(title))
        style.caption(figure, f"Lines: moving averages of the mean over {seeds} seeds. Bands: the seeds' range.")
        return figure

    style.save(path, build, alt=title)


def _variant(axis: Axes, curve: Curve, look: style.Mark, name: str) -> tuple[float, float]:
    """Draw one variant's curve; returns its end."""
    seen = np.isfinite(curve.values).any(0)
    images, values = curve.images[seen], curve.values[:, seen]
    mean = _smooth(np.nanmean(values, 0))
    axis.plot(images, mean, label=plain(name), color=look.color, linestyle=look.dashes)
    if len(values) > 1:
        style.band(axis, images, _smooth(np.nanmin(values, 0)), _smooth(np.nanmax(values, 0)), look.color)
    return float(images[-1]), float(mean[-1])


def _smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Centred moving average; shorter windows at both ends."""
    half = min(width, len(values)) // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
