"""The HTTP format of remote rewards (docs/rewards/remote.md), for client and server alike."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flowbench.prompts import Prompt, as_prompt
from flowbench.reading.pictures import PictureError, read_picture

MAX_SIDE = 4096  # pixels; a PNG of a few kilobytes can claim gigabytes
MAX_PIXELS = 2**28  # of all images of a request
TOKEN = "FLOWBENCH_REWARD_TOKEN"

ImageFormat = Literal["png", "float32"]


class FormatError(ValueError):
    """What was received does not follow the format; the message says where."""


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScoreRequest(_Body):
    """B images and their prompts.

    images: base64 of PNG files, or of little-endian float32 values in [0, 1] in the order of `shape`, (3, H, W);
    metadata, categories: of each prompt, sent to servers that say that they take them.
    """

    format: ImageFormat
    images: list[str] = Field(min_length=1)
    prompts: list[str]
    shape: tuple[int, int, int] | None = None
    metadata: list[dict[str, Any]] | None = None
    categories: list[str] | None = None


class ScoreReply(BaseModel):
    """B scores; unknown keys are ignored."""

    scores: list[float]


def pack(images: torch.Tensor, prompts: tuple[str, ...], format: ImageFormat, metadata: bool = False) -> str:
    """The JSON body of a request for images (B, 3, H, W) in [0, 1]; PNG rounds them to 8 bits.

    metadata: whether it has the prompts' categories and metadata; a server that does not know them refuses the keys.
    """
    cpu = images.detach().float().cpu()
    asked = [as_prompt(p) for p in prompts]
    if format == "png":
        pixels = (cpu.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        encoded, shape = [_png(p) for p in pixels], None
    else:
        encoded = [_text(image.numpy().astype("<f4").tobytes()) for image in cpu]
        shape = (cpu.shape[1], cpu.shape[2], cpu.shape[3])
    request = ScoreRequest(
        format=format,
        images=encoded,
        prompts=[p.text for p in asked],
        shape=shape,
        metadata=[dict(p.metadata) for p in asked],
        categories=[p.category for p in asked],
    )
    return request.model_dump_json(exclude=None if metadata else {"metadata", "categories"})


def unpack(body: bytes, pixels: int = MAX_PIXELS) -> tuple[torch.Tensor, tuple[Prompt, ...]]:
    """Images (B, 3, H, W) float32 in [0, 1] and B prompts of a request's JSON body.

    pixels: that all images together may have, by what they say of themselves before one of them is decoded.
    Raises FormatError.
    """
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise FormatError(_where(error)) from error
    if len(request.images) != len(request.prompts):
        raise FormatError(f"{len(request.images)} images for {len(request.prompts)} prompts")
    for name in ("metadata", "categories"):
        given = getattr(request, name)
        if given is not None and len(given) != len(request.prompts):
            raise FormatError(f"{len(given)} {name} for {len(request.prompts)} prompts")
    if request.format == "float32" and request.shape is None:
        raise FormatError("format float32 needs shape, [3, height, width]")
    files = [_bytes(text, i) for i, text in enumerate(request.images)]
    _check_pixels(files, request, pixels)
    images = [_decode(data, request, i) for i, data in enumerate(files)]
    for i, image in enumerate(images):
        if image.shape != images[0].shape:
            raise FormatError(f"image {i} has {_size(image)} pixels, image 0 has {_size(images[0])}")
    count = len(request.prompts)
    told = zip(request.prompts, request.categories or [""] * count, request.metadata or [{}] * count, strict=True)
    stacked = torch.stack(images) if count > 1 else images[0][None]
    return stacked, tuple(Prompt(text, category, metadata) for text, category, metadata in told)


def read_scores(body: bytes, count: int) -> torch.Tensor:
    """Scores (B,) of a reply's JSON body.

    Raises FormatError when it is no reply, or has another number of scores than `count`.
    """
    try:
        reply = ScoreReply.model_validate_json(body)
    except ValidationError as error:
        raise FormatError(_where(error)) from error
    if len(reply.scores) != count:
        raise FormatError(f"{len(reply.scores)} scores for {count} images")
    return torch.tensor(reply.scores)


def _bytes(text: str, index: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"image {index} is not base64") from error


def _check_pixels(files: Sequence[bytes], request: ScoreRequest, most: int) -> None:
    """Raise FormatError for images that have too many pixels, alone or together."""
    total = 0
    for i, data in enumerate(files):
        width, height = _size_of_png(data, i) if request.format == "png" else _size_of_shape(request.shape)
        if max(width, height) > MAX_SIDE:
            raise FormatError(f"image {i} has {width} x {height} pixels; at most {MAX_SIDE} a side")
        total += width * height
    if total > most:
        raise FormatError(f"the images have {total} pixels together; at most {most} in a request")


def _size_of_png(data: bytes, index: int) -> tuple[int, int]:
    """Width and height that a PNG's first chunk claims (its specification, 5.3 and 11.2.1)."""
    if len(data) < 24 or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise FormatError(f"image {index} is not a PNG file")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _size_of_shape(shape: tuple[int, int, int] | None) -> tuple[int, int]:
    assert shape is not None
    if shape[0] != 3 or not all(0 < n <= MAX_SIDE for n in shape[1:]):
        raise FormatError(f"shape {list(shape)} is not [3, height, width] with sides from 1 to {MAX_SIDE}")
    return shape[2], shape[1]


def _decode(data: bytes, request: ScoreRequest, index: int) -> torch.Tensor:
    return _from_png(data, index) if request.format == "png" else _from_floats(data, request.shape, index)


def _from_floats(data: bytes, shape: tuple[int, int, int] | None, index: int) -> torch.Tensor:
    assert shape is not None
    if len(data) != 4 * shape[0] * shape[1] * shape[2]:
        raise FormatError(f"image {index} has {len(data)} bytes; shape {list(shape)} needs {4 * np.prod(shape)}")
    image = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32).reshape(shape))
    if not (image.isfinite().all() and image.min() >= 0 and image.max() <= 1):
        raise FormatError(f"image {index} has values outside [0, 1]")
    return image


def _from_png(data: bytes, index: int) -> torch.Tensor:
    try:
        pixels = read_picture(data, ("PNG",))
    except PictureError as error:
        raise FormatError(f"image {index} is not a PNG file that can be scored: it {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return _text(buffer.getvalue())


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _size(image: torch.Tensor) -> str:
    return f"{image.shape[2]} x {image.shape[1]}"


def _where(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg'].lower()}" if place else first["msg"].lower()
