"""The running average of the trained weights, which is what a run's evaluation sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class WeightAverage:
    """average = d average + (1 - d) weights after the n-th step, with d = min(decay, (1 + n) / (10 + n)).

    The ramp is that of the codes of Flow-GRPO, DiffusionNFT and AWM (yifan123/flow_grpo, flow_grpo/ema.py). A constant
    decay leaves decay^n of the initial weights in a run of n steps, 79 % after 18 steps at 0.987. While the ramp rises
    it leaves 10 / C(n + 10, 9): 1.4 % after 3 steps, 6e-5 after 10, 1.4e-6 after 18. The average then remembers about
    the last ninth of all steps so far, so that short and long runs are judged at the same stage.

    weights: the tensors, empty if the run keeps no average; steps: how many weights went in.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], decay: float) -> None:
        self.parameters, self.decay, self.steps = parameters, decay, 0
        self.weights = [p.detach().clone() for p in parameters] if decay else []

    def step(self) -> None:
        """Take in the current weights."""
        if not self.weights:
            return
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.weights, [p.detach() for p in self.parameters], 1 - decay)

    def use(self) -> None:
        """Put the average, if there is one, in place of the current weights."""
        for p, a in zip(self.parameters, self.weights, strict=False):
            p.data.copy_(a)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it, the average is in place of the current weights."""
        current = [p.detach().clone() for p in self.parameters]
        self.use()
        try:
            yield
        finally:
            for p, c in zip(self.parameters, current, strict=True):
                p.data.copy_(c)
