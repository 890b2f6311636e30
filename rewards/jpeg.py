"""Compressibility: the reward of DDPO (2305.13301, section 5.1) that needs no model."""

from __future__ import annotations

import io

import torch
from PIL import Image

from flowbench.reward import Reward, register_reward


@register_reward(
    "jpeg",
    source="2305.13301, section 5.1",
    licence="Apache-2.0",
    range=(float("-inf"), 0.0),
    differentiable=False,
    discrete=True,  # whole bytes
    reads_prompt=False,
)
class Jpeg(Reward):
    """JPEG compressibility: minus the size in kilobytes at quality 95; the prompt is ignored."""

    pure = True

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        pixels = (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([-self._kilobytes(Image.fromarray(p)) for p in pixels])

    @staticmethod
    def _kilobytes(image: Image.Image) -> float:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=95)
        return buffer.tell() / 1000
