"""What training spends: counted images and calls, and seconds by part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from flowbench.models.counting import FORWARD

OVERHEAD = ("prepare",)  # parts that are none of model, VAE and reward


@dataclass
class Budget:
    """What training spent. seconds is its wall time; the parts in `timings` are shares of it.

    evaluations: velocities by purpose, see `models.counting`; updates: optimizer steps of the policy.
    """

    images: int = 0
    reward_calls: int = 0
    evaluations: dict[str, int] = field(default_factory=dict)
    updates: int = 0
    seconds: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def function_evaluations(self) -> int:
        """Velocities of one latent each, backward passes aside."""
        return sum(self.evaluations.get(purpose, 0) for purpose in FORWARD)

    @property
    def overhead(self) -> float:
        """The share of the seconds outside model, VAE and reward."""
        inside = sum(seconds for part, seconds in self.timings.items() if part not in OVERHEAD)
        return 1 - inside / max(self.seconds, 1e-9)

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
