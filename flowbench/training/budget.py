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

    A part's seconds are those of the thread that does it. Where decoding and scoring lie beside a rollout
    (`training.overlap`), the parts sum to more than the wall time.

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
        """The share of the seconds outside model, VAE and reward; 0 where these, beside each other, sum to more."""
        inside = sum(seconds for part, seconds in self.timings.items() if part not in OVERHEAD)
        return max(1 - inside / max(self.seconds, 1e-9), 0.0)

    @contextmanager
    def timed(self, part: str, device: torch.device) -> Iterator[None]:
        """Add the seconds that the context takes, in this thread's stream of the device too, to a part.

        Threads may time different parts at once.
        """
        begun = time.perf_counter()
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # not what another thread has asked for
            self.timings[part] = self.timings.get(part, 0.0) + time.perf_counter() - begun
