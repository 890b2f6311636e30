"""Measures the embedded models on fresh scenes: the figures of their model cards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from flowbench.builders.data import draw_captions, draw_images
from flowbench.testbeds.shapes.oracle import View, judge, judge_images, see
from flowbench.testbeds.shapes.world import Caption, mutate

HELD_OUT = 987_654  # seed of scenes that no training stage draws


@torch.no_grad()
def vae_round_trip(vae: AutoencoderKL, n: int = 1000) -> tuple[float, float]:
    """PSNR in dB on n held-out renders, and the share whose right verdict survives encoding and decoding."""
    rng = np.random.default_rng(HELD_OUT)
    captions = draw_captions(n, rng)
    images = draw_images(captions, rng)
    decoded = torch.cat([vae.decode(vae.encode(x * 2 - 1).latent_dist.mean).sample for x in images.split(100)])
    decoded = (decoded / 2 + 0.5).clamp(0, 1)
    psnr = -10 * math.log10((decoded - images).square().mean().item())
    return psnr, exact_share(decoded, captions)


def exact_share(images: torch.Tensor, captions: Sequence[Caption]) -> float:
    """Share of images whose every condition the oracle finds met."""
    return float(np.mean([v.exact for v in judge_images(images.numpy(), list(captions))]))


def exclusive_captions(n: int, rng: np.random.Generator) -> tuple[torch.Tensor, list[Caption]]:
    """n scenes with captions such that no caption is true of another scene.

    Otherwise "a red circle" and "a small red circle" would both be right answers, and retrieval would measure that.
    """
    chosen: list[tuple[torch.Tensor, View, Caption]] = []
    while len(chosen) < n:
        candidates = draw_captions(n, rng)
        drawn = draw_images(candidates, rng)
        for image, view, caption in zip(drawn, see(drawn.numpy()), candidates, strict=True):
            true_elsewhere = (judge(v, caption).exact or judge(view, c).exact for _, v, c in chosen)
            if len(chosen) < n and not any(true_elsewhere):
                chosen.append((image, view, caption))
    return torch.stack([image for image, _, _ in chosen]), [caption for _, _, caption in chosen]


@torch.no_grad()
def retrieval_top1(model: torch.nn.Module, tokenizer: object, rounds: int = 5, n: int = 64) -> float:
    """Share of held-out scenes whose own caption is the nearest among n mutually exclusive ones."""
    rng = np.random.default_rng(HELD_OUT + 1)
    hits = 0
    for _ in range(rounds):
        images, captions = exclusive_captions(n, rng)
        image = F.normalize(model.encode_image(images * 2 - 1), dim=1)  # type: ignore[operator]
        text = F.normalize(model.encode_text(tokenizer([c.text for c in captions])), dim=1)  # type: ignore[operator]
        hits += int((image @ text.T).argmax(1).eq(torch.arange(n)).sum())
    return hits / (rounds * n)


@torch.no_grad()
def mutation_accuracy(model: torch.nn.Module, tokenizer: object, n: int = 1000) -> float:
    """Share of held-out scenes that score higher with their caption than with one attribute changed."""
    rng = np.random.default_rng(HELD_OUT + 2)
    captions = draw_captions(n, rng)
    images = draw_images(captions, rng)
    image = F.normalize(model.encode_image(images * 2 - 1), dim=1)  # type: ignore[operator]
    right, wrong = (
        (image * F.normalize(model.encode_text(tokenizer([c.text for c in part])), dim=1)).sum(1)  # type: ignore[operator]
        for part in (captions, [mutate(c, rng) for c in captions])
    )
    return float((right > wrong).float().mean())
