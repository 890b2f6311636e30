"""What a run and a reward's worker say to each other: a JSON header and raw tensor bytes, nothing pickled.

A frame is a fixed prefix (magic, length of the header, length of all tensors), the header in UTF-8, and the bytes of
the tensors one after another in the order of the header. Requests and replies alternate.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from flowbench.prompts import Prompt, as_prompt

MAGIC = b"FBW1"
_PREFIX = struct.Struct(">4sIQ")
MAX_HEADER, MAX_PAYLOAD = 2**26, 2**36
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}


class WireError(Exception):
    """The other side is gone, or what it sent is no frame."""


@dataclass(frozen=True)
class Load:
    """Make the reward: its name, the plug-in file that registers it (or None), constructor arguments, device."""

    reward: str
    plugin: str | None
    arguments: dict[str, Any]
    device: str
    threads: int


@dataclass(frozen=True)
class Ready:
    """The reward is loaded. provenance: its own, for the record."""

    provenance: dict[str, Any]


@dataclass(frozen=True)
class Score:
    """Score images (B, 3, H, W).

    call: a number to ask for the gradient by, or None if none will be asked for. details: of each prompt, category,
    metadata and the path of the reference image, which both sides can read; None if nothing more than the texts is
    known.
    """

    images: torch.Tensor
    prompts: list[str]
    call: int | None
    details: list[tuple[str, dict[str, Any], str | None]] | None = None

    @classmethod
    def of(cls, images: torch.Tensor, prompts: tuple[str, ...], call: int | None) -> Score:
        """The request for these prompts with all that is known of them."""
        asked = [as_prompt(p) for p in prompts]
        known = any(p.category or p.metadata or p.reference for p in asked)
        details = [(p.category, dict(p.metadata), str(p.reference) if p.reference else None) for p in asked]
        return cls(images, [p.text for p in asked], call, details if known else None)

    def full_prompts(self) -> tuple[Prompt, ...]:
        """The prompts with all that was sent of them."""
        if self.details is None:
            return tuple(map(as_prompt, self.prompts))
        return tuple(
            Prompt(text, category, metadata, Path(reference) if reference else None)
            for text, (category, metadata, reference) in zip(self.prompts, self.details, strict=True)
        )


@dataclass(frozen=True)
class Scored:
    """Scores as the reward returned them."""

    scores: torch.Tensor


@dataclass(frozen=True)
class Backward:
    """Multiply the Jacobian of an earlier call's scores with `cotangent`, shaped as those scores."""

    call: int
    cotangent: torch.Tensor


@dataclass(frozen=True)
class Gradient:
    """The product, shaped as the call's images."""

    images: torch.Tensor


@dataclass(frozen=True)
class Forgotten:
    """The graph of that call is no longer held; score again."""


@dataclass(frozen=True)
class Failed:
    """The request failed. error: "UsageError", "RunError" or another exception's name; traceback: for --debug."""

    error: str
    message: str
    traceback: str


Message = Load | Ready | Score | Scored | Backward | Gradient | Forgotten | Failed
_MESSAGES: dict[str, type[Message]] = {
    m.__name__: m for m in (Load, Ready, Score, Scored, Backward, Gradient, Forgotten, Failed)
}


def send(connection: socket.socket, message: Message) -> None:
    """Write one frame.

    Raises WireError when the other side is gone, TypeError for a field that JSON cannot express.
    """
    plain, tensors = {}, {}
    for field in fields(message):
        value = getattr(message, field.name)
        if isinstance(value, torch.Tensor):
            tensors[field.name] = value.detach().cpu().contiguous()
        else:
            plain[field.name] = value
    described = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
    header = json.dumps({"type": type(message).__name__, "fields": plain, "tensors": described}).encode()
    payload = [_bytes(t) for t in tensors.values()]
    try:
        connection.sendall(_PREFIX.pack(MAGIC, len(header), sum(map(len, payload))) + header)
        for part in payload:
            connection.sendall(part)
    except OSError as error:
        raise WireError(str(error)) from error


def receive(connection: socket.socket) -> Message:
    """Read one frame.

    Raises WireError when the other side is gone, or for anything that is no frame of a known message.
    """
    magic, header_size, payload_size = _PREFIX.unpack(_exactly(connection, _PREFIX.size))
    if magic != MAGIC or header_size > MAX_HEADER or payload_size > MAX_PAYLOAD:
        raise WireError("no frame of flowbench's worker protocol")
    try:
        header = json.loads(_exactly(connection, header_size))
        cls, plain = _MESSAGES[header["type"]], dict(header["fields"])
        described = [(str(name), DTYPES[dtype], [int(n) for n in shape]) for name, dtype, shape in header["tensors"]]
    except (ValueError, KeyError, TypeError) as error:
        raise WireError(f"malformed header: {type(error).__name__}: {error}") from error
    sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in described]
    if min(sizes, default=0) < 0 or sum(sizes) != payload_size:
        raise WireError("the tensors' shapes do not fit the frame's length")
    for name, dtype, shape in described:
        plain[name] = _tensor(connection, dtype, shape)
    try:
        return cls(**plain)
    except TypeError as error:
        raise WireError(f"malformed message: {error}") from error


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _tensor(connection: socket.socket, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    _fill(connection, _bytes(tensor))
    return tensor


def _exactly(connection: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    _fill(connection, memoryview(buffer))
    return bytes(buffer)


def _fill(connection: socket.socket, view: memoryview) -> None:
    while view:
        try:
            count = connection.recv_into(view)
        except OSError as error:
            raise WireError(str(error)) from error
        if not count:
            raise WireError("the other side has closed the connection")
        view = view[count:]
