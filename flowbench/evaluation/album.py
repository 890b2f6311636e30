"""Images of an evaluation that are kept, as files, with the scores of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image

from flowbench.files import write_atomically
from flowbench.names import path_name
from flowbench.prompts import Prompt

# Prompts of a split, which prompt and which of its images each row is, images (N, 3, H, W), scores (N,) by metric.
Scored: TypeAlias = "Mapping[str, torch.Tensor]"
Keep: TypeAlias = "Callable[[Sequence[Prompt], Sequence[tuple[int, int]], torch.Tensor, Scored], None]"
Page: TypeAlias = "Callable[[str, str, float], Keep]"  # of a split, an ending of its metrics' names, a guidance scale


@dataclass(frozen=True)
class KeptImage:
    """An image file. file: within the album's folder; model: "base" or "tuned"; image: which of the prompt's images."""

    file: str
    split: str
    model: str
    guidance_scale: float
    prompt_index: int
    image: int
    prompt: Prompt
    scores: Mapping[str, float]


class Album:
    """Keeps images below a folder: <split>/<base|tuned>/<prompt>-<image>.png, numbers from 0.

    Those sampled without guidance, where others have it, lie in <base|tuned>-unguided. kept: of this process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept: list[KeptImage] = []

    def of(self, model: str) -> Page:
        """Where the images of "base" or "tuned" go, for `score_split`."""
        return partial(self._page, model)

    def _page(self, model: str, split: str, ending: str, scale: float) -> Keep:
        place = f"{path_name(split)}/{model}{'-unguided' if ending else ''}"

        def keep(
            prompts: Sequence[Prompt],
            rows: Sequence[tuple[int, int]],
            images: torch.Tensor,
            scores: Scored,
        ) -> None:
            for i, (p, k) in enumerate(rows):
                file = f"{place}/{p:04d}-{k}.png"
                pixels = (images[i].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
                write_atomically(self.folder / file, Image.fromarray(pixels).save, durable=False)
                own = {metric: float(values[i]) for metric, values in scores.items()}
                self.kept.append(KeptImage(file, split, model, scale, p, k, prompts[p], own))

        return keep
