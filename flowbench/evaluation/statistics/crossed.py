"""Seeds and prompts crossed: mean squares, standard errors and t intervals of a mean over both.

A method's gains d (K, P), tuned minus base for K seeds and P prompts, are taken to be

    d_kp = mean + prompt_p + seed_k + residual_kp

with independent random effects (two-way crossed, one value per cell). What a mean is an estimate of depends on what
would be drawn anew if the experiment were repeated:

    "these prompts"         seeds alone: variance MS_seed / (K P), K - 1 degrees of freedom, an ordinary t interval
    "prompts like these"    prompts too: variance (MS_prompt + max(MS_seed - MS_residual, 0)) / (K P), with the degrees
                            of freedom of Satterthwaite (1946, Biometrics Bulletin 2, 110-114)

docs/statistics.md has their coverage in simulation and why the bootstrap is not used with so few seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from scipy import special  # scipy.stats has the same functions and takes a second to import

Over: TypeAlias = Literal["these prompts", "prompts like these"]
THESE: Over = "these prompts"
LIKE: Over = "prompts like these"


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    low and high are None where the data cannot say (fewer than two seeds or, over prompts like these, two prompts).
    over: what it speaks of; seeds, prompts: what it was computed from; failed: seeds that were run and gave no
    result, of which it therefore says nothing.
    """

    value: float
    low: float | None
    high: float | None
    over: Over
    seeds: int
    prompts: int
    failed: int = 0


@dataclass(frozen=True)
class Components:
    """Standard deviations of the three random effects of gains: between prompts, between seeds, residual; >= 0."""

    prompts: float
    seeds: float
    residual: float


@dataclass(frozen=True, eq=False)
class MeanSquares:
    """Means and mean squares of arrays (..., K, P), each (...); nan where K or P is too small.

    seeds K and seeds_df, the degrees of freedom of by_seed (K - 1 unless it is pooled), broadcast to (...).
    """

    mean: np.ndarray
    by_seed: np.ndarray
    by_prompt: np.ndarray
    residual: np.ndarray
    seeds: np.ndarray
    seeds_df: np.ndarray
    prompts: int


def mean_squares(values: np.ndarray) -> MeanSquares:
    """The two-way analysis of variance of values (..., K, P), float64."""
    values = np.asarray(values, dtype=np.float64)
    k, p = values.shape[-2:]
    mean, of_seeds, of_prompts = values.mean((-1, -2)), values.mean(-1), values.mean(-2)
    fit = of_seeds[..., :, None] + of_prompts[..., None, :] - mean[..., None, None]
    nothing = np.full_like(mean, np.nan)
    return MeanSquares(
        mean=mean,
        by_seed=p * of_seeds.var(-1, ddof=1) if k > 1 else nothing,
        by_prompt=k * of_prompts.var(-1, ddof=1) if p > 1 else nothing,
        residual=((values - fit) ** 2).sum((-1, -2)) / ((k - 1) * (p - 1)) if k > 1 and p > 1 else nothing,
        seeds=np.full(mean.shape, k),
        seeds_df=np.full(mean.shape, k - 1.0),
        prompts=p,
    )


def components(values: np.ndarray) -> Components:
    """The standard deviations of the random effects of values (K, P); a negative estimate of a variance counts as 0.

    Raises ValueError for fewer than two seeds or two prompts.
    """
    k, p = values.shape
    if k < 2 or p < 2:
        raise ValueError(f"components need two seeds and two prompts, got {k} and {p}")
    ms = mean_squares(values)
    residual = float(ms.residual)
    between = [max(float(square) - residual, 0.0) for square in (ms.by_prompt, ms.by_seed)]
    return Components(math.sqrt(between[0] / k), math.sqrt(between[1] / p), math.sqrt(residual))


def spread(ms: MeanSquares, over: Over) -> tuple[np.ndarray, np.ndarray]:
    """Standard error of the mean and its degrees of freedom, each (...); nan where the data cannot say."""
    if over == THESE:
        return np.sqrt(ms.by_seed / (ms.seeds * ms.prompts)), ms.seeds_df
    between_seeds = ms.by_seed > ms.residual
    variance = ms.by_prompt + np.where(between_seeds, ms.by_seed - ms.residual, 0 * ms.by_seed)
    # The residual's own term is left out: with (K - 1)(P - 1) degrees of freedom it is far below the others.
    share = ms.by_prompt**2 / max(ms.prompts - 1, 1) + np.where(between_seeds, ms.by_seed**2 / ms.seeds_df, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        df = np.where(share > 0, variance**2 / share, 1.0)
    return np.sqrt(variance / (ms.seeds * ms.prompts)), df


def half_width(ms: MeanSquares, over: Over, level: float) -> np.ndarray:
    """Half of the t interval's width, (...); nan where the data cannot say."""
    error, df = spread(ms, over)
    return special.stdtrit(df, (1 + level) / 2) * error


def p_values(ms: MeanSquares, over: Over) -> np.ndarray:
    """Two-sided p of the hypothesis that the mean is 0, (...); 1 where the data cannot say and for a mean of 0."""
    error, df = spread(ms, over)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * special.stdtr(df, -np.abs(ms.mean) / error)
    return np.where(ms.mean == 0, 1.0, np.nan_to_num(p, nan=1.0))


def interval(ms: MeanSquares, over: Over, level: float, failed: int = 0) -> Interval:
    """The interval of one mean (mean squares of shape ())."""
    half, value = float(half_width(ms, over, level)), float(ms.mean)
    known = not math.isnan(half)
    low, high = (value - half, value + half) if known else (None, None)
    return Interval(value, low, high, over, int(ms.seeds), ms.prompts, failed)
