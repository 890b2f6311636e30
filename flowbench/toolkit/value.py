"""A light value of a sampler's states: V(x_sigma, c, step)."""

from __future__ import annotations

import math

import torch
from torch import nn

MOST_CELLS = 64  # per axis: the code's latents of Stable Diffusion 1.5


class StepValue(nn.Module):
    """Predicts the terminal reward from a sampler's state: three layers whose outputs have a gain for each step.

    DPOK's value network (google-research/google-research, commit 1d49f2c0, dpok/reward_model.py, ValueMulti of width
    256). Larger latents than 64 by 64 are averaged down to that; the text is normalised; V starts from 0, so that an
    untrained value leaves the reward as it is. Inputs x (R, C, h, w), text summary (R, D), and step (R,), whole numbers
    from 0 to steps - 1 in any dtype; output (R,).
    """

    def __init__(self, latent_shape: tuple[int, int, int], text_width: int, steps: int, width: int = 256) -> None:
        super().__init__()
        channels, height, wide = latent_shape
        self.cells = (min(height, MOST_CELLS), min(wide, MOST_CELLS))
        inputs = (channels * math.prod(self.cells) + text_width, width, width)
        self.text = nn.LayerNorm(text_width)
        self.layers = nn.ModuleList(_ScaledLinear(n, width, steps) for n in inputs)
        self.last = nn.Linear(width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: torch.Tensor, summary: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """V(x_sigma, c, step), (R,)."""
        dtype, step = self.last.weight.dtype, step.long()
        x = nn.functional.adaptive_avg_pool2d(x.to(dtype), self.cells)
        features = torch.cat([x.flatten(1), self.text(summary.to(dtype))], 1)
        for layer in self.layers:
            features = torch.relu(layer(features, step))
        value: torch.Tensor = self.last(features)[:, 0]
        return value


class _ScaledLinear(nn.Module):
    """A linear layer whose outputs are multiplied by gains of the step."""

    def __init__(self, inputs: int, outputs: int, steps: int) -> None:
        super().__init__()
        self.linear, self.gain = nn.Linear(inputs, outputs), nn.Embedding(steps, outputs)
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.uniform_(self.gain.weight)

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self.gain(step) * self.linear(x)
        return scaled
