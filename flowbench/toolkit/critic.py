"""A light critic of intermediate states: V(x_sigma, sigma, c)."""

from __future__ import annotations

import math

import torch
from torch import nn


class StateCritic(nn.Module):
    """Predicts the terminal reward from a noisy latent: two convolutions, the text as a gain on their channels, an MLP.

    Inputs x (R, C, h, w) with h and w at least `side`, sigma (R,) in [0, 1], text summary (R, D); output (R,).
    """

    frequency: torch.Tensor

    def __init__(self, channels: int, text_width: int, width: int = 64, side: int = 8) -> None:
        super().__init__()
        pooled = min(side, 8)
        cells = (pooled + 1) // 2  # per axis, after the second convolution
        self.text = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width), nn.SiLU())
        self.noise = nn.Sequential(nn.Linear(16, width), nn.SiLU())
        self.conv = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(pooled),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
        )
        self.gain = nn.Linear(2 * width, 2 * width)
        last = nn.Linear(2 * width, 1)
        self.head = nn.Sequential(
            nn.Linear(width * cells * cells + 2 * width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.SiLU(),
            last,
        )
        # Start from V = 0: an untrained critic leaves the shaped reward as it is.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.register_buffer("frequency", math.pi * 2.0 ** torch.arange(8), persistent=False)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        """V(x_sigma, sigma, c), (R,)."""
        dtype = self.frequency.dtype
        phase = sigma.to(dtype)[:, None] * self.frequency
        condition = torch.cat([self.text(summary.to(dtype)), self.noise(torch.cat([phase.sin(), phase.cos()], 1))], 1)
        scale, shift = self.gain(condition)[:, :, None, None].chunk(2, dim=1)
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        features = torch.nn.functional.silu(self.conv(x) * (1 + scale) + shift).flatten(1)
        value: torch.Tensor = self.head(torch.cat([features, condition], 1))[:, 0]
        return value


def explained_variance(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - Var(target - value) / Var(target): 1 is perfect, 0 is as good as the mean, negative is worse."""
    return 1 - (target - value).var() / target.var().clamp_min(1e-12)


def explained_by_sigma(value: torch.Tensor, target: torch.Tensor, sigma: torch.Tensor) -> dict[str, torch.Tensor]:
    """Explained variance (a scalar each) of the rows in three ranges of sigma, named by where a range begins."""
    ranges = {f"explained_variance_{low:.2f}": (sigma >= low) & (sigma < low + 0.34) for low in (0.0, 0.33, 0.66)}
    return {name: explained_variance(value[rows], target[rows]) for name, rows in ranges.items() if rows.sum() > 2}
