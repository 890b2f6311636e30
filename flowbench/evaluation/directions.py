"""What update directions are worth beside the true gradient, from inner products alone.

K updates a_k from independent batches, and J parts b_j of a Monte Carlo estimate of the true gradient g, are all noisy.
Lengths of their means are estimated from pairs of different batches, in which the noise has the mean 0:

    |E a|^2 = mean of <a_k, a_l>, k != l        |g|^2 = mean of <b_i, b_j>, i != j        <E a, g> = mean of <a_k, b_j>

That is the average over all ways to split the batches into two halves, and so is every quantity made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from scipy import stats

from flowbench.errors import RunError

RESAMPLES = 1000
BLOCK = 2**18  # coordinates whose products are taken at a time, in float64

Rows: TypeAlias = "np.ndarray"  # numbers of batches or parts, (n,) int64; in a resample some come twice
Statistic: TypeAlias = Callable[[Rows, Rows], float]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval over batches; None where the data do not determine it."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Worth:
    """What the update of one batch of `images` images is worth.

    projection: <E a, g> / (|g| rms |a|) in [-1, 1], what a step along one batch's update gains as a share of what a
    step of the same length along the true gradient gains; cosine: of the mean update and the true gradient, in
    [-1, 1]; bias: 1 - cosine^2, the share of the mean update's squared length that does not point along the true
    gradient; noise: the images after which the noise of the mean update is as long as its signal; drift: |E s|^2 /
    (|E s|^2 + |E (a - s)|^2) with s the update under shuffled rewards, in [0, 1]; cosine_without_drift: of E (a - s).
    The last two are None where the rewards were not shuffled.
    """

    images: int
    projection: Estimate
    cosine: Estimate
    bias: Estimate
    noise: Estimate
    drift: Estimate | None
    cosine_without_drift: Estimate | None

    @property
    def projection_per_image(self) -> float:
        """The projection of one batch divided by its images."""
        assert self.projection.value is not None
        return self.projection.value / self.images


@dataclass(frozen=True)
class Products:
    """Inner products of K updates with each other (K, K) and with the J parts of the true gradient (K, J)."""

    own: np.ndarray
    truth: np.ndarray


def inner_products(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> np.ndarray:
    """<left_i, right_j> of vectors (D,), (len(left), len(right)) float64."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for start in range(0, len(left[0]), BLOCK):
        one, other = (torch.stack([v[start : start + BLOCK] for v in side]).double() for side in (left, right))
        total += (one @ other.T).cpu()
    return total.numpy()


def worth(
    updates: Sequence[torch.Tensor],
    shuffled: Sequence[torch.Tensor] | None,
    truth: Sequence[torch.Tensor],
    images: int,
) -> Worth:
    """What updates (D,) of batches of `images` images are worth, beside the parts (D,) of the true gradient.

    shuffled: the update of each of these batches with its rewards shuffled within prompts. A truth of one part is
    taken to be exact. Raises RunError for a truth that is not told apart from its noise.
    """
    parts = inner_products(truth, truth)
    if squared_length(parts, np.arange(len(truth))) <= 0:
        raise RunError("the true gradient is not told apart from its noise; raise --images")
    whole = _products(updates, truth)
    drift, rest = None, None
    if shuffled is not None:
        rewarded = [a - s for a, s in zip(updates, shuffled, strict=True)]
        remains, driven = inner_products(shuffled, shuffled), _products(rewarded, truth)
        drift = _estimate(lambda k, j: _share(remains, driven.own, k), len(updates), 1)
        rest = _estimate(lambda k, j: _cosine(driven, parts, k, j), len(updates), len(truth))

    def estimated(statistic: Statistic) -> Estimate:
        return _estimate(statistic, len(updates), len(truth))

    return Worth(
        images=images,
        projection=estimated(lambda k, j: _projection(whole, parts, k, j)),
        cosine=estimated(lambda k, j: _cosine(whole, parts, k, j)),
        bias=estimated(lambda k, j: 1 - _cosine(whole, parts, k, j) ** 2),
        noise=_estimate(lambda k, j: images * _noise(whole.own, k), len(updates), 1),
        drift=drift,
        cosine_without_drift=rest,
    )


def squared_length(products: np.ndarray, rows: Rows) -> float:
    """Squared length of the mean of vectors, without their noise; a single vector has none. nan without pairs."""
    if len(products) == 1:
        return float(products[0, 0])
    different = rows[:, None] != rows[None]
    chosen = products[np.ix_(rows, rows)]
    return float(chosen[different].mean()) if different.any() else float("nan")


def _products(vectors: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> Products:
    return Products(inner_products(vectors, vectors), inner_products(vectors, truth))


def _cosine(products: Products, parts: np.ndarray, k: Rows, j: Rows) -> float:
    along = products.truth[np.ix_(k, j)].mean()
    squares = squared_length(products.own, k), squared_length(parts, j)
    if min(squares) <= 0:  # as if without length: the interval says that any angle is possible
        return float(np.sign(along))
    return float(np.clip(along / np.sqrt(squares[0] * squares[1]), -1, 1))


def _projection(products: Products, parts: np.ndarray, k: Rows, j: Rows) -> float:
    along, length = products.truth[np.ix_(k, j)].mean(), products.own[k, k].mean()
    square = squared_length(parts, j)
    if length == 0:
        return 0.0
    return float(np.clip(along / np.sqrt(length * square), -1, 1)) if square > 0 else float(np.sign(along))


def _noise(own: np.ndarray, k: Rows) -> float:
    """Variance of one batch's update over the squared length of the mean."""
    signal = squared_length(own, k)
    return max(float(own[k, k].mean()) - signal, 0.0) / signal if signal > 0 else float("inf")


def _share(remains: np.ndarray, driven: np.ndarray, k: Rows) -> float:
    drift, signal = (max(squared_length(products, k), 0.0) for products in (remains, driven))
    return drift / (drift + signal) if drift + signal > 0 else float("nan")


def _estimate(statistic: Statistic, batches: int, parts: int) -> Estimate:
    """The statistic of all batches and parts, with its interval over resamples of both."""
    samples = [np.arange(batches), *([np.arange(parts)] if parts > 1 else [])]

    def of(*rows: Rows) -> float:
        return statistic(rows[0], rows[1] if len(rows) > 1 else np.zeros(1, dtype=np.int64))

    drawn = stats.bootstrap(
        samples,
        of,
        n_resamples=RESAMPLES,
        vectorized=False,
        paired=False,
        method="percentile",
        rng=np.random.default_rng(0),
    ).bootstrap_distribution
    drawn = drawn[~np.isnan(drawn)]
    ends = np.quantile(drawn, (0.025, 0.975), method="nearest") if len(drawn) else (np.nan, np.nan)
    return Estimate(*(float(x) if np.isfinite(x) else None for x in (of(*samples), *ends)))
