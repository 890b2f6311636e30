"""Pictures of the analytic models: points against the frontier, and samples in the plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowbench.escape import plain
from flowbench.evaluation.exact_study import KL, PATH_KL, PATH_REWARD, REWARD, ExactStudy
from flowbench.record import Score
from flowbench.reporting import style
from flowbench.testbeds.plane.density import Frontier, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_study(path: Path, study: ExactStudy, log: Sequence[dict[str, Any]], scores: Mapping[str, Score]) -> None:
    """frontier.png of a run: its path over training and its end against the frontier, beside samples of both models."""
    config, metrics = study.config, [line["metrics"] for line in log]
    trail = [Point(m[PATH_REWARD], m[PATH_KL]) for m in metrics if PATH_KL in m]
    split = config.evaluation.splits[0]
    end = None
    if f"{KL}/{split}" in scores:
        end = Point(scores[f"{REWARD}/{split}"].tuned, scores[f"{KL}/{split}"].tuned)
    samples = {name: study.samples(weights) for name, weights in (("base", "reference"), ("tuned", "current"))}
    furthest = 1.1 * max([0.05, *(p.kl for p in trail), *([end.kl] if end else [])])
    title = f"{config.algorithm} on {config.reward}, {config.model}, seed {config.seed}"
    frontier_picture(path, study.exact.frontier(furthest), furthest, trail, end, samples, title, config.algorithm)


def frontier_picture(
    path: Path,
    frontier: Frontier,
    furthest: float,
    trail: Sequence[Point],
    end: Point | None,
    samples: Mapping[str, torch.Tensor],
    title: str,
    algorithm: str = "",
) -> None:
    """The frontier up to a KL, a run's path and end (None: it has no KL), beside samples (N, 2) of each model."""
    points = [Point(frontier.base, 0.0), *trail, *([end] if end else [])]
    kl = furthest * np.linspace(0, 1, 60) ** 2
    look = style.mark(algorithm)

    def build(theme: style.Theme) -> Figure:
        figure = style.figure(style.FULL, 3.6)
        left, right = figure.subplots(1, 2)
        left.plot(kl, [frontier.base + frontier.gain(k) for k in kl], color=theme.truth, label="frontier")
        path_of = ([p.kl for p in points], [p.reward for p in points])
        left.plot(*path_of, marker=".", color=look.color, alpha=0.6, label="training")
        left.plot(0, frontier.base, "o", color=theme.base, label="base")
        if end:
            left.plot(end.kl, end.reward, look.marker, color=look.color, markersize=9, label="tuned")
        left.set(xlabel="KL from the base model (nats)", ylabel="E[r]")
        left.legend(loc="lower right")
        scatter(right, samples, (theme.base, look.color))
        figure.suptitle(plain(title))
        return figure

    style.save(path, build, alt=title)


def sample_picture(path: Path, samples: Mapping[str, torch.Tensor], title: str) -> None:
    """Samples (N, 2) of each model in one plane."""

    def build(theme: style.Theme) -> Figure:
        figure = style.figure(style.HALF, style.HALF)
        axis = figure.subplots()
        axis.set_title(style.wrap(title, 40))
        scatter(axis, samples, (theme.base, style.COLORS["policy-gradient"]))
        return figure

    style.save(path, build, alt=title)


def scatter(axis: Axes, samples: Mapping[str, torch.Tensor], colors: tuple[str, str]) -> None:
    """Samples (N, 2) of each model as dots."""
    for (name, x), color in zip(samples.items(), colors, strict=False):
        axis.scatter(x[:, 0].numpy(), x[:, 1].numpy(), s=5, alpha=0.5, color=color, label=plain(name), linewidths=0)
    axis.set_xlabel("$x_1$", parse_math=True)
    axis.set_ylabel("$x_2$", parse_math=True)
    axis.set_aspect("equal")
    axis.legend(loc="upper left")
