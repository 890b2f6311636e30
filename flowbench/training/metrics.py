"""What an update says of itself, kept on the device until its end: reading a number makes the host wait for it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from flowbench.errors import RunError


class Metrics:
    """Means over rows of named values that come in parts.

    parts: per name the mean of each part, a number on the device of its values, and how many values it had.
    """

    def __init__(self) -> None:
        self.parts: dict[str, list[tuple[torch.Tensor, int]]] = {}

    def add(self, name: str, values: torch.Tensor | float) -> None:
        """Take in values (R,), or one that stands for all rows."""
        values = torch.as_tensor(values).detach()
        if values.numel():
            self.parts.setdefault(name, []).append((values.float().mean(), values.numel()))

    def means(self) -> dict[str, torch.Tensor]:
        """Each name's mean over all values, where the values are."""
        return {name: _mean(parts) for name, parts in self.parts.items()}

    def fetched(self) -> dict[str, float]:
        """The means, in one transfer."""
        means = self.means()
        return dict(zip(means, fetch(means.values()), strict=True))


class Finite:
    """Numbers that must be finite. They are looked at together, so that no step waits for its own.

    A step that was not finite is found before anything of its iteration is saved.
    """

    def __init__(self) -> None:
        self._watched: list[tuple[str, torch.Tensor]] = []

    def watch(self, fault: str, value: torch.Tensor) -> None:
        """Let `check` look at this number; fault: what it says of one that is not finite, with {} in its place."""
        self._watched.append((fault, value.detach()))

    def check(self) -> None:
        """Forget all numbers that were watched since the last check.

        Raises RunError for the first of them that was not finite.
        """
        watched, self._watched = self._watched, []
        for (fault, _), value in zip(watched, fetch(value for _, value in watched), strict=True):
            if not math.isfinite(value):
                raise RunError(fault.format(value))


def fetch(numbers: Iterable[torch.Tensor]) -> list[float]:
    """Numbers, each a tensor without dimensions, as Python's: one transfer from each device that they are on."""
    numbers = list(numbers)
    found = [0.0] * len(numbers)
    for device in dict.fromkeys(n.device for n in numbers):
        places = [i for i, n in enumerate(numbers) if n.device == device]
        values = torch.stack([numbers[i].to(_wide(device)) for i in places]).tolist()
        for i, value in zip(places, values, strict=True):
            found[i] = value
    return found


def _mean(parts: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0][0]  # to the last bit
    total = sum(n for _, n in parts)
    return torch.stack([mean.to(_wide(mean.device)) * n for mean, n in parts]).cumsum(0)[-1] / total


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which mps does not have
