"""Pictures of a run: sample grids and learning curves, as PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowbench.record import Point
from flowbench.terms import path_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

os.environ.setdefault("MPLBACKEND", "Agg")

TRUTH = "oracle_exact"
DEV_METRICS = (TRUTH, "diversity", "w2", "kl")  # at the points, beside the reward
TITLES = {TRUTH: "truth (oracle, exact)", "diversity": "diversity", "w2": "distance (w2)", "kl": "distance (KL)"}
SHOWN_METRICS = (
    "w2",
    "fit",
    "critic_loss",
    "explained_variance_0.66",
    "explained_variance_0.33",
    "effective_sample_size",
)


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
    from matplotlib.figure import Figure

    rows, n, _, height, width = next(iter(columns.values())).shape
    figure = Figure(figsize=(2.4 + len(columns) * n * 0.85, rows * 0.87 + 0.4), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for axis, (title, images) in zip(axes, columns.items(), strict=True):
        padded = np.ones((rows, n, height + 2, width + 2, 3), dtype=np.float32)
        padded[:, :, 1:-1, 1:-1] = images.clamp(0, 1).permute(0, 1, 3, 4, 2).numpy()
        axis.imshow(
            padded.transpose(0, 2, 1, 3, 4).reshape(rows * (height + 2), n * (width + 2), 3), interpolation="nearest"
        )
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[0].set_yticks([(r + 0.5) * (height + 2) for r in range(rows)], prompts, fontsize=8, parse_math=False)
    axes[0].tick_params(length=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def learning_curves(
    path: Path,
    lines: list[dict],
    title: str,
    reward: str = "reward",
    base: Mapping[str, float] = MappingProxyType({}),
    points: Sequence[Point] = (),
) -> None:
    """What a run learned, over images: scores on dev at the points of its budget, a panel for each metric worth a look.

    reward: what is trained on; base, points: the base model's scores on dev, and those on the way. Behind them, thin,
    the noisy means over the images trained on; where there are no points, these alone.
    """
    from matplotlib.figure import Figure

    images = np.array([line["images"] for line in lines])
    name, trained = path_name(reward), np.array([line["reward"] for line in lines])
    behind = {name: (images, trained), TRUTH: _logged(lines, TRUTH)}
    scores = {metric for point in points for metric in point.scores}
    panels = [m for m in (name, *DEV_METRICS) if m in scores or (m in behind and behind[m][1].size)]
    logged = [m for m in SHOWN_METRICS if m not in scores and any(m in line["metrics"] for line in lines)][:3]
    count = len(panels) + len(logged)
    figure = Figure(figsize=(3.6 * count, 3.1), dpi=110, layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, metric in zip(axes, panels, strict=False):
        _panel(axis, metric, behind.get(metric), base, points)
        axis.set_title(TITLES.get(metric, f"reward: {metric}"), parse_math=False)
    for axis, metric in zip(axes[len(panels) :], logged, strict=True):
        axis.plot(*_logged(lines, metric), color="tab:gray", linewidth=1)
        axis.set_title(metric.replace("_", " "), parse_math=False)
    for axis in axes:
        axis.set_xlabel("images")
        axis.grid(alpha=0.3)
    figure.suptitle(title, parse_math=False)
    if handles := axes[0].get_legend_handles_labels()[0]:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.savefig(path)


def _panel(
    axis: Axes,
    metric: str,
    behind: tuple[np.ndarray, np.ndarray] | None,
    base: Mapping[str, float],
    points: Sequence[Point],
) -> None:
    """One metric: dots on dev from the base model on, and thin behind them what training saw."""
    if behind is not None and behind[1].size:
        seen, values = behind
        axis.plot(seen, values, color="tab:blue", alpha=0.3, linewidth=0.8, label="images trained on")
        if not points:
            axis.plot(seen, _smooth(values), color="tab:blue")
    known = [(point.images, point.scores[metric]) for point in points if metric in point.scores]
    if metric in base:
        known = [(0, base[metric]), *known]
    if known:
        axis.plot(*zip(*known, strict=True), color="tab:orange", marker="o", markersize=4, label="averaged policy, dev")


def _logged(lines: list[dict], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and values where a metric was logged."""
    points = [(line["images"], line["metrics"][metric]) for line in lines if metric in line["metrics"]]
    return np.array([i for i, _ in points]), np.array([value for _, value in points])


def ablation_curves(path: Path, variants: Mapping[str, Mapping[str, Curve]], title: str) -> None:
    """Each quantity in a panel of its own: per variant the mean over seeds, and the seeds' range as a band."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for curves in variants.values() for name in curves))
    figure = Figure(figsize=(4.6 * len(names), 3.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        for variant, curves in variants.items():
            if name not in curves:
                continue
            curve = curves[name]
            seen = np.isfinite(curve.values).any(0)
            images, values = curve.images[seen], curve.values[:, seen]
            (line,) = axis.plot(images, _smooth(np.nanmean(values, 0)), label=variant)
            if len(values) > 1:
                band = (_smooth(edge) for edge in (np.nanmin(values, 0), np.nanmax(values, 0)))
                axis.fill_between(images, *band, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=name.replace("_", " "), xlabel="images")
        axis.grid(alpha=0.3)
        if name.startswith("explained_variance"):
            axis.set_ylim(bottom=max(axis.get_ylim()[0], -1.0))  # an untrained critic can be arbitrarily bad
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(variants))
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Centred moving average; shorter windows at both ends."""
    half = min(width, len(values)) // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
