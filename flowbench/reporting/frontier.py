"""Pictures of the analytic models: points against the frontier, and samples in the plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowbench.evaluation.exact_study import KL, PATH_KL, PATH_REWARD, REWARD, ExactStudy
from flowbench.record import Score
from flowbench.testbeds.plane.density import Frontier, Point

COLORS = ("tab:gray", "tab:red")


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
    frontier_picture(path, study.exact.frontier(furthest), furthest, trail, end, samples, title)


def frontier_picture(
    path: Path,
    frontier: Frontier,
    furthest: float,
    trail: Sequence[Point],
    end: Point | None,
    samples: Mapping[str, torch.Tensor],
    title: str,
) -> None:
    """The frontier up to a KL, a run's path and end (None: it has no KL), beside samples (N, 2) of each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    points = [Point(frontier.base, 0.0), *trail, *([end] if end else [])]
    kl = furthest * np.linspace(0, 1, 60) ** 2
    left.plot(kl, [frontier.base + frontier.gain(k) for k in kl], color="black", label="frontier")
    left.plot([p.kl for p in points], [p.reward for p in points], ".-", color="tab:blue", alpha=0.6, label="training")
    left.plot(0, frontier.base, "o", color=COLORS[0], label="base")
    if end:
        left.plot(end.kl, end.reward, "*", color=COLORS[1], markersize=13, label="tuned")
    left.set(title=title, xlabel="KL from the base model (nats)", ylabel="E[r]")
    left.legend(loc="lower right")
    left.grid(alpha=0.3)
    scatter(right, samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def sample_picture(path: Path, samples: Mapping[str, torch.Tensor], title: str) -> None:
    """Samples (N, 2) of each model in one plane."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 4.4), dpi=110, layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, parse_math=False)  # a prompt may hold dollar signs
    scatter(axis, samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def scatter(axis: Any, samples: Mapping[str, torch.Tensor]) -> None:
    """Samples (N, 2) of each model as dots."""
    for (name, x), color in zip(samples.items(), COLORS, strict=False):
        axis.scatter(*x.T.numpy(), s=5, alpha=0.5, color=color, label=name, linewidths=0)
    axis.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    axis.legend(loc="upper left")
    axis.grid(alpha=0.3)
