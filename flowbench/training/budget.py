"""What a run spends: counted images and calls, and seconds by part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Budget:
    """What a run spent. seconds is wall time of training; the parts in `timings` are shares of it."""

    images: int = 0
    reward_calls: int = 0
    function_evaluations: int = 0
    seconds: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, part: str, device: torch.device) -> Iterator[None]:
        """Add the seconds that the context takes, on this device too, to a part."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize()
            self.timings[part] = self.timings.get(part, 0.0) + time.perf_counter() - begun
