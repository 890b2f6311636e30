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


@dataclass(frozen=True)
class Needs:
    """What the parts of a run need, in bytes, and compute.

    model: transformer with its views, VAE, optimizer and the algorithm's own networks; gradients: of what is trained;
    reward: of the run; encoders: of each text encoder, with `encode` for the texts; judges: each judge, with its slope.
    step: a sampler step of one image with the most guidance, `states` bytes kept per image; free: operations of one
    without guidance.
    update: one row; evaluations: function evaluations of a row by weight view; scored: reward calls of a row;
    rows: rows per image and pass; pixels: one image in float32; evaluation_decode: images that an evaluation decodes at
    a time; smallest: rows of the smallest microbatch.
    """

    model: int
    gradients: int
    reward: int
    encoders: dict[str, int]
    encode: Slope
    step: Slope
    free: float
    states: int
    decode: Slope
    score: Slope
    update: Slope
    evaluations: dict[str, float]
    scored: float
    rows: float
    judges: dict[str, tuple[int, Slope]]
    pixels: int
    evaluation_decode: int
    smallest: int = 1
