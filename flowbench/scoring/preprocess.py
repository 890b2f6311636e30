"""How images reach a reward model: resized, brought to a square, and normalised.

Two paths. Scores that are reported take the one of the models' own packages: 8-bit pixels resized by PIL. Scores that
are trained on with gradients take the same steps on tensors, so that gradients reach every pixel at full resolution.
Each step below works on both, so that the geometry cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Picture = TypeVar("Picture", "torch.Tensor", Image.Image)


def resize_shortest_side(image: Picture, size: int) -> Picture:
    """Bicubic, so that the shorter side has `size` pixels."""
    from torchvision.transforms.functional import InterpolationMode, resize

    return resize(image, [size], InterpolationMode.BICUBIC, antialias=True)


def crop_shortest_side(image: Picture, size: int) -> Picture:
    """Shorter side to `size`, then torchvision's central square: OpenAI's CLIP, ImageReward."""
    from torchvision.transforms.functional import center_crop

    return center_crop(resize_shortest_side(image, size), [size, size])


def crop_shortest_side_floor(image: Picture, size: int) -> Picture:
    """Shorter side to `size`, then transformers' central square, which rounds an odd margin down: PickScore."""
    from torchvision.transforms.functional import crop, get_image_size

    image = resize_shortest_side(image, size)
    width, height = get_image_size(image)
    return crop(image, (height - size) // 2, (width - size) // 2, size, size)


def pad_longest_side(image: Picture, size: int) -> Picture:
    """Longer side to `size`, then black on both sides of the shorter one: HPSv2."""
    from torchvision.transforms.functional import InterpolationMode, get_image_size, pad, resize

    width, height = get_image_size(image)
    if max(width, height) == size:
        scaled = (height, width)
    else:
        scale = size / max(width, height)
        scaled = (round(height * scale), round(width * scale))
        image = resize(image, list(scaled), InterpolationMode.BICUBIC, antialias=True)
    top, left = (size - scaled[0]) // 2, (size - scaled[1]) // 2
    return pad(image, [left, top, size - scaled[1] - left, size - scaled[0] - top], fill=0)


@dataclass(frozen=True)
class Preprocessing:
    """Square images (B, 3, size, size) in [0, 1] for a model, before its own normalisation."""

    size: int
    fit: Callable[[torch.Tensor, int], torch.Tensor]  # one of the functions above

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) by the tensor path if they carry a gradient, else by PIL's."""
        if torch.is_grad_enabled() and images.requires_grad:
            return self.differentiable(images)
        return self.reported(images)

    def differentiable(self, images: torch.Tensor) -> torch.Tensor:
        """On tensors, with gradients to every pixel."""
        return self.fit(images, self.size).clamp(0, 1)

    def reported(self, images: torch.Tensor) -> torch.Tensor:
        """By way of 8-bit PIL images, as the models' own packages read files."""
        pictures, threads = to_pil(images), torch.get_num_threads()
        if threads == 1 or len(pictures) == 1:
            return torch.stack([self.from_pil(picture) for picture in pictures]).to(images.device)
        with ThreadPoolExecutor(threads) as pool:  # PIL resizes outside of Python's lock
            return torch.stack([*pool.map(self.from_pil, pictures)]).to(images.device)

    def from_pil(self, picture: Image.Image) -> torch.Tensor:
        """One picture of any mode, (3, size, size)."""
        from torchvision.transforms.functional import to_tensor

        return to_tensor(self.fit(picture, self.size).convert("RGB"))  # type: ignore[arg-type, attr-defined]


class TensorPreprocessing(Preprocessing):
    """8-bit pixels, but resized as tensors, and what bicubic resizing overshoots is kept: HPSv2's package."""

    def differentiable(self, images: torch.Tensor) -> torch.Tensor:
        """As on the reporting path, without the rounding to 8 bits."""
        return self.fit(images, self.size)

    def from_pil(self, picture: Image.Image) -> torch.Tensor:
        """One picture of any mode, (3, size, size)."""
        from torchvision.transforms.functional import to_tensor

        return self.fit(to_tensor(picture.convert("RGB")), self.size)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [0, 1] as 8-bit pictures, rounded as diffusers does."""
    pixels = (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def normalize(x: torch.Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> torch.Tensor:
    """(x - mean) / std per channel of (B, 3, H, W)."""
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]
