"""What tuning changed, in images: base above tuned, the same noise in the same column."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowbench.escape import plain
from flowbench.names import path_name
from flowbench.reporting import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flowbench.evaluation.pairs import Pair

TRUTH = "oracle_exact"
ROWS, IMAGES = 4, 4  # prompts in each block, images of a prompt
TICK, CROSS = "✓", "✗"
CAPTION, PROMPT = 0.16, 0.34  # inches below an image and above a prompt's images


@dataclass(frozen=True)
class Sampled:
    """One prompt's images (n, 3, H, W) in [0, 1] by both models, from the same noise.

    rewards: of the base's and of the tuned model's images, each (n,); correct: what the truth says of them; None where
    it is not known. change: by how much the prompt's mean score moved, over all of its images.
    """

    prompt: str
    base: torch.Tensor
    tuned: torch.Tensor
    change: float
    rewards: tuple[np.ndarray, np.ndarray] | None = None
    correct: tuple[np.ndarray, np.ndarray] | None = None


def changed_samples(path: Path, sampled: Sequence[Sampled], title: str, reward: str, rows: int = ROWS) -> None:
    """A PNG with the prompts that changed most, and beside them as many others, drawn by chance.

    Chance depends on the prompts alone, so that all runs on them show the same. title: of the picture; reward: the name
    of what stands under each image.
    """
    most, others = blocks(sampled, rows)
    height, width = sampled[0].base.shape[2:]
    n = min(len(sampled[0].base), IMAGES)
    size = (style.FULL - 0.3) / 2 / max(n, 2) - 0.04  # inches
    tall = PROMPT + 2 * (size * height / width + CAPTION)

    def build(theme: style.Theme) -> Figure:
        figure = style.figure(style.FULL, tall * len(most) + 1.1)
        axes = figure.subplots(1, 2)
        for axis, name, chosen in zip(axes, ("changed most", "drawn by chance"), (most, others), strict=True):
            _block(axis, theme, chosen, n, size, size * height / width)
            axis.text(0, -0.05, name, fontweight="bold")
            axis.set(xlim=(0, n * (size + 0.04)), ylim=(tall * len(most), -0.25), aspect="equal")
            axis.set_axis_off()
        figure.suptitle(plain(title))
        marks = f"; {TICK} and {CROSS}: the truth's verdict" if sampled[0].correct else ""
        number = f"Under each image its {plain(reward)}{marks}. " if sampled[0].rewards else ""
        style.caption(
            figure,
            f"Of each prompt the base model's images above the tuned model's, from the same noise. {number}"
            f"Ordered by the change of a prompt's mean, of {len(sampled)} prompts.",
        )
        return figure

    style.save(path, build, alt="; ".join(s.prompt for s in (*most, *others)))


def draw_pairs(folder: Path, pairs: Mapping[str, Pair], reward: str, title: str) -> None:
    """SPLIT.png in the folder for every split of a run whose samples are images."""
    for split, pair in pairs.items():
        if pair.base.grid.shape[2] == 3:
            name = path_name(reward)
            changed_samples(folder / f"{split}.png", sampled_of(pair, name), f"{title}, split {split}", name)


def sampled_of(pair: Pair, reward: str) -> list[Sampled]:
    """The prompts of which an evaluation has images, with the scores of each; changed in the reward, or the truth."""
    by = next((m for m in (reward, TRUTH, *pair.base.scores) if m in pair.base.scores), None)
    change = pair.tuned.scores[by] - pair.base.scores[by] if by else np.zeros(len(pair.base.prompts))

    def each(metric: str, k: int) -> tuple[np.ndarray, np.ndarray] | None:
        if metric not in pair.base.each or metric not in pair.tuned.each:
            return None
        return pair.base.each[metric][k], pair.tuned.each[metric][k]

    return [
        Sampled(
            prompt=pair.base.prompts[k].text,
            base=pair.base.grid[k],
            tuned=pair.tuned.grid[k],
            change=float(change[k]),
            rewards=each(reward, k),
            correct=each(TRUTH, k),
        )
        for k in range(len(pair.base.grid))
    ]


def blocks(sampled: Sequence[Sampled], rows: int = ROWS) -> tuple[list[Sampled], list[Sampled]]:
    """The prompts that changed most, and as many of the others by chance."""
    order = sorted(sampled, key=lambda s: (-abs(s.change), s.prompt))
    most, rest = order[:rows], order[rows:]
    return most, sorted(rest, key=lambda s: zlib.crc32(s.prompt.encode("utf-8", "replace")))[: len(most)]


def _block(axis: Axes, theme: style.Theme, chosen: Sequence[Sampled], n: int, width: float, height: float) -> None:
    """Prompts below each other, in inches."""
    y = 0.0
    for one in chosen:
        letters = int(n * (width + 0.04) * 72 / (style.TEXT * 0.52))
        axis.text(0, y + PROMPT - 0.03, style.wrap(one.prompt, letters), va="bottom", fontsize=style.TEXT - 1)
        y += PROMPT
        for side, images in enumerate((one.base, one.tuned)):
            for k in range(min(n, len(images))):
                x = k * (width + 0.04)
                pixels = images[k].clamp(0, 1).permute(1, 2, 0).numpy()
                axis.imshow(pixels, extent=(x, x + width, y + height, y), interpolation="nearest")
                axis.text(
                    x + width / 2,
                    y + height + CAPTION / 2,
                    _said(one, side, k),
                    ha="center",
                    va="center",
                    fontsize=style.TEXT - 2,
                    color=theme.base if side == 0 else theme.ink,
                )
            y += height + CAPTION


def _said(one: Sampled, side: int, k: int) -> str:
    number = f"{one.rewards[side][k]:.2f}" if one.rewards else ""
    verdict = (TICK if one.correct[side][k] >= 1 else CROSS) if one.correct else ""
    return f"{number} {verdict}".strip()
