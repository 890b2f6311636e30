"""What the parts of a run need and compute, per image or row: what a plan is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slope:
    """Bytes of a part of the work as a linear function of how much of it is done at a time.

    fixed: of nothing; each: of one image or row more; flops: operations of one.
    """

    fixed: float
    each: float
    flops: float = 0.0

    def at(self, n: int) -> int:
        """Bytes of n images or rows."""
        return round(self.fixed + self.each * n)

    def most(self, room: float) -> int:
        """How many fit into `room` bytes; 0 if none does."""
        if self.each <= 0:
            return 2**30 if self.fixed <= room else 0
        return max(0, int((room - self.fixed) / self.each))


@dataclass(frozen=True)
class Needs:
    """What the parts of a run need, in bytes, and compute.

    model: transformer with its views, VAE, optimizer and the algorithm's own networks; gradients: of what is trained;
    reward: of the run; encoders: of each text encoder, with `encode` for the texts; judges: each judge, with its slope.
    step: one sampler step of an image in training, with `states` bytes kept per image; free: one without guidance.
    update: one row; evaluations: function evaluations of a row by weight view; scored: reward calls of a row;
    rows: rows per image and pass; evaluation: one step of an image in evaluation; pixels: one image in float32.
    """

    model: int
    gradients: int
    reward: int
    encoders: dict[str, int]
    encode: Slope
    step: Slope
    free: Slope
    states: int
    decode: Slope
    score: Slope
    update: Slope
    evaluations: dict[str, float]
    scored: float
    rows: float
    judges: dict[str, tuple[int, Slope]]
    pixels: int
    smallest: int = 1
