"""Small regression heads on a model's embedding, as aesthetic predictors and ImageReward have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from flowbench.errors import RunError
from flowbench.scoring.checkpoints import are_random, load_strictly

PUBLISHED = (1024, 128, 64, 16, 1)  # widths of the published predictors' layers, and their numbers
PUBLISHED_PLACES = (0, 2, 4, 6, 7)


class Layers(nn.Module):
    """Linear layers in a row, without activations, as the published heads are; named "layers.0", "layers.2", ...

    sizes: width of the input and of each layer, the last one 1; places: the layers' numbers. The numbers between them
    are dropout in training, which is nothing here.
    """

    def __init__(self, sizes: tuple[int, ...], places: tuple[int, ...] | None = None) -> None:
        super().__init__()
        places = places or tuple(range(len(sizes) - 1))
        layers: list[nn.Module] = [nn.Identity() for _ in range(places[-1] + 1)]
        for place, width, out in zip(places, sizes, sizes[1:], strict=False):
            layers[place] = nn.Linear(width, out)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Values (B,) of embeddings (B, D)."""
        return self.layers(x).squeeze(1)


def load_head(reward: str, path: Path, tensors: Mapping[str, torch.Tensor], width: int) -> Layers:
    """The head of a file for embeddings of `width`: "layers.N.weight" and "layers.N.bias", or one "weight" and "bias".

    Raises RunError for a file that holds no such head.
    """
    if are_random():
        return Layers((width, *PUBLISHED), PUBLISHED_PLACES).eval().requires_grad_(False)
    if set(tensors) == {"weight", "bias"}:
        tensors = {f"layers.0.{name}": value for name, value in tensors.items()}
    places = sorted(int(m[1]) for m in (re.fullmatch(r"layers\.(\d+)\.weight", name) for name in tensors) if m)
    shapes = [tuple(tensors[f"layers.{p}.weight"].shape) for p in places]
    sizes = (width, *(shape[0] for shape in shapes))
    if not shapes or sizes[-1] != 1 or shapes != [(b, a) for a, b in pairwise(sizes)]:
        raise RunError(f"reward '{reward}': '{path}' holds no head for embeddings of width {width}")
    head = Layers(sizes, tuple(places))
    load_strictly(reward, path, head, tensors)
    return head.eval().requires_grad_(False)
