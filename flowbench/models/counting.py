"""How many velocities a run computes, and what for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

SAMPLING, TRAINING, BACKWARD, REFERENCE = "sampling", "training", "backward", "reference"
DEV, EVALUATION = "dev", "evaluation"
FORWARD = (SAMPLING, TRAINING, REFERENCE)  # passes of training


class Evaluations:
    """Velocities of one latent each, by purpose.

    "sampling": along a path from noise to an image, whatever the view; "training": through the trained weights in an
    update; "backward": backward passes of such, each at the forward pass that it belongs to; "reference": through any
    other view in an update; "dev" and "evaluation": within `counted_as` these. What is counted is what was done: an
    attempt that runs out of memory is taken back by `back`.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._purpose: str | None = None

    @property
    def total(self) -> int:
        """Forward passes of training."""
        return sum(self.counts.get(purpose, 0) for purpose in FORWARD)

    def add(self, n: int, trained: bool, graded: bool) -> None:
        """Count n velocities; trained: through the weights that are tuned; graded: a backward pass will follow."""
        purpose = self._purpose or (TRAINING if trained else REFERENCE)
        self.counts[purpose] = self.counts.get(purpose, 0) + n
        if graded and purpose in FORWARD:
            self.counts[BACKWARD] = self.counts.get(BACKWARD, 0) + n

    @contextmanager
    def counted_as(self, purpose: str) -> Iterator[None]:
        """Within it all velocities are for this purpose, unless an outer context has said which."""
        before, self._purpose = self._purpose, self._purpose or purpose
        try:
            yield
        finally:
            self._purpose = before

    def mark(self) -> dict[str, int]:
        """The counts as they are now, for `back`."""
        return dict(self.counts)

    def back(self, mark: dict[str, int]) -> None:
        """Forget what was counted since a mark."""
        self.counts = dict(mark)
