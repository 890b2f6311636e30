"""Training data of the embedded models: scenes drawn afresh from the world, with the captions that may be used."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from flowbench.testbeds.shapes.world import CATEGORIES, Caption, all_captions, is_compositional, render, sample_scenes


@cache
def training_captions() -> dict[str, list[Caption]]:
    """Captions by category, without the compositional split."""
    allowed = [c for c in all_captions() if not is_compositional(c)]
    return {k: [c for c in allowed if c.category == k] for k in CATEGORIES}


def draw_captions(n: int, rng: np.random.Generator) -> list[Caption]:
    """n training captions, all categories equally likely."""
    pools = training_captions()
    return [pools[k][rng.integers(len(pools[k]))] for k in rng.choice(CATEGORIES, n)]


def draw_images(captions: list[Caption], rng: np.random.Generator) -> torch.Tensor:
    """One fresh scene per caption, (N, 3, 32, 32) float32 in [0, 1]."""
    return torch.from_numpy(render(sample_scenes(captions, rng)))
