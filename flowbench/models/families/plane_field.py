"""Velocity fields of the analytic models: the exact field of the reference, plus a correction that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.polynomial.legendre import leg2poly
from safetensors.torch import save_file
from torch import nn

from flowbench.files import write_atomically
from flowbench.testbeds.plane.density import Density, Gaussian, GaussianMixture

TEXT_WIDTH = 4  # of the text embedding, which is zero: prompts say nothing about points
DEGREE = 5


class AffineCorrection(nn.Module):
    """sum_k P_k(2 sigma - 1) (a_k + B_k x), with Legendre polynomials P_k up to degree 5; zero at the start.

    A field that is affine in x keeps the sampler's distribution Gaussian.
    """

    legendre: torch.Tensor
    exponents: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(DEGREE + 1, width))
        self.gain = nn.Parameter(torch.zeros(DEGREE + 1, width, width))
        coefficients = torch.zeros(DEGREE + 1, DEGREE + 1)  # of P_k in column k
        for k in range(DEGREE + 1):
            coefficients[: k + 1, k] = torch.from_numpy(leg2poly([0] * k + [1]))
        self.register_buffer("legendre", coefficients, persistent=False)
        self.register_buffer("exponents", torch.arange(DEGREE + 1), persistent=False)

    def basis(self, sigma: torch.Tensor) -> torch.Tensor:
        """P_k(2 sigma - 1) of sigma (N,), (N, DEGREE + 1)."""
        return (2 * sigma - 1)[:, None] ** self.exponents @ self.legendre

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """x (N, D), sigma (N,); (N, D)."""
        p = self.basis(sigma)
        gain = (p @ self.gain.flatten(1)).view(len(x), *self.gain.shape[1:])
        return p @ self.shift + (gain * x[:, None]).sum(2)


class NetworkCorrection(nn.Module):
    """A network of two hidden layers on x, sigma and sigma x; its last layer is zero at the start."""

    def __init__(self, width: int, hidden: int = 32) -> None:
        super().__init__()
        last = nn.Linear(hidden, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(
            nn.Linear(2 * width + 1, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last
        )

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """x (N, D), sigma (N,); (N, D)."""
        s = sigma[:, None]
        out: torch.Tensor = self.layers(torch.cat([x, s * x, s], 1))
        return out

    def linearized(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The correction (N, D) and its slope in x (N, D, D); sigma the same in all rows."""
        s, width = sigma[:, None], x.shape[1]
        first, *rest = self.layers
        assert isinstance(first, nn.Linear)
        value = first(torch.cat([x, s * x, s], 1))
        slope = first.weight[:, :width] + s[:1] * first.weight[:, width : 2 * width]
        for layer in rest:
            if isinstance(layer, nn.Linear):
                value, slope = layer(value), layer.weight @ slope
            else:
                gate = torch.sigmoid(value)
                value, slope = value * gate, (gate * (1 + value * (1 - gate)))[:, :, None] * slope
        return value, slope


class VelocityField(nn.Module):
    """v(x, sigma) of a density, exact, plus a trainable correction; stands where a pipeline has its transformer."""

    def __init__(self, density: Density) -> None:
        super().__init__()
        self.density = density
        width = density.width
        self.correction = AffineCorrection(width) if isinstance(density, Gaussian) else NetworkCorrection(width)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """x (N, D), sigma (N,); (N, D)."""
        velocity: torch.Tensor = self.density.velocity(x, sigma) + self.correction(x, sigma)
        return velocity

    def linearized(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """v (N, D) and dv/dx (N, D, D) of a mixture's field; sigma (N,) the same in all rows."""
        assert isinstance(self.density, GaussianMixture)
        assert isinstance(self.correction, NetworkCorrection)
        parts = self.density.linearized(x, sigma), self.correction.linearized(x, sigma)
        v, slope = (a + b for a, b in zip(*parts, strict=True))
        return v, slope

    def enable_gradient_checkpointing(self, _: Any = None) -> None:
        """There is no memory to save."""

    def save_pretrained(self, folder: Path) -> None:
        """Write the correction's weights."""
        weights = self.correction.state_dict()
        write_atomically(folder / "correction.safetensors", lambda place: save_file(weights, place))
