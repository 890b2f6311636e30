"""What update directions are worth beside the true gradient, from inner products alone.

K updates a_k from independent batches, and J parts b_j of a Monte Carlo estimate of the true gradient g, are all noisy.
Lengths of their means are estimated from pairs of different batches, in which the noise has the mean 0:

    |E a|^2 = mean of <a_k, a_l>, k != l        |g|^2 = mean of <b_i, b_j>, i != j        <E a, g> = mean of <a_k, b_j>

That is the average over all ways to split the batches into two halves, and so is every quantity made of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from scipy import stats

from flowbench.errors import RunError

RESAMPLES = 1000
BLOCK = 2**18  # coordinates whose products are taken at a time, in float64

# How often each batch, or part, is in a resample: (..., K) of the sum K. Statistics are of many resamples at a time.
Counts: TypeAlias = "np.ndarray"
Statistic: TypeAlias = Callable[[Counts, Counts], np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval over batches; None where the data do not determine it."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Worth:
    """What the update of one batch of `images` images is worth.

    projection: <E a, g> / rms |a|, the gain of the mean reward per length of a step along one batch's update, in the
    reward's units, whatever the loss's scale; cosine: of the mean update and the true gradient, in [-1, 1]; bias:
    1 - cosine^2, the share of the mean update's squared length that does not point along the true gradient; noise: the
    images after which the noise of the mean update is as long as its signal; drift: |E s|^2 / (|E s|^2 +
    |E (a - s)|^2) with s the update under shuffled rewards, in [0, 1]; cosine_without_drift: of E (a - s). The last two
    are None where the rewards were not shuffled.
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
    if not squared_length(parts, np.ones(len(truth))) > 0:
        raise RunError("the true gradient is not told apart from its noise; raise --images")
    whole, drift, rest = _products(updates, truth), None, None
    if shuffled is not None:
        rewarded = [a - s for a, s in zip(updates, shuffled, strict=True)]
        remains, driven = inner_products(shuffled, shuffled), _products(rewarded, truth)
        drift = _estimate(lambda k, j: _share(remains, driven.own, k), len(updates), 1)
        rest = _estimate(lambda k, j: _cosine(driven, parts, k, j), len(updates), len(truth), bound=1)
    cosine = _estimate(lambda k, j: _cosine(whole, parts, k, j), len(updates), len(truth), bound=1)
    return Worth(
        images=images,
        projection=_estimate(lambda k, j: _projection(whole, k, j), len(updates), len(truth)),
        cosine=cosine,
        bias=_bias(cosine),
        noise=_estimate(lambda k, j: images * _noise(whole.own, k), len(updates), 1),
        drift=drift,
        cosine_without_drift=rest,
    )


def squared_length(products: np.ndarray, counts: Counts) -> np.ndarray:
    """Squared length of the mean of vectors with these inner products, without their noise, (...).

    It is the mean over pairs of different vectors, also where one is in a resample twice; nan without such a pair. A
    single vector has no noise.
    """
    if len(products) == 1:
        return np.full(counts.shape[:-1], products[0, 0])
    same = (counts**2) @ np.diag(products)
    pairs = counts.sum(-1) ** 2 - (counts**2).sum(-1)
    return (np.einsum("...i,ij,...j", counts, products, counts) - same) / np.where(pairs > 0, pairs, np.nan)


def _products(vectors: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> Products:
    return Products(inner_products(vectors, vectors), inner_products(vectors, truth))


def _along(products: Products, k: Counts, j: Counts) -> np.ndarray:
    """Inner product of the mean update and the mean true gradient."""
    return np.einsum("...i,ij,...j", k, products.truth, j) / (k.sum(-1) * j.sum(-1))


def _cosine(products: Products, parts: np.ndarray, k: Counts, j: Counts) -> np.ndarray:
    """In [-1, 1]; +-infinity where a length is not told from 0."""
    along, squares, other = _along(products, k, j), squared_length(products.own, k), squared_length(parts, j)
    told = (squares > 0) & (other > 0)
    lengths = np.sqrt(np.where(told, squares, 1) * np.where(told, other, 1))
    return np.where(told, np.clip(along / lengths, -1, 1), np.where(along < 0, -np.inf, np.inf))


def _bias(cosine: Estimate) -> Estimate:
    """1 - cosine^2, over the cosine's interval."""
    value = None if cosine.value is None else 1 - cosine.value**2
    if cosine.low is None or cosine.high is None:
        return Estimate(value, None, None)
    squares = cosine.low**2, cosine.high**2
    return Estimate(value, 1 - max(squares), 1 if cosine.low <= 0 <= cosine.high else 1 - min(squares))


def _projection(products: Products, k: Counts, j: Counts) -> np.ndarray:
    with_noise = k @ np.diag(products.own) / k.sum(-1)
    return _along(products, k, j) / np.sqrt(np.where(with_noise > 0, with_noise, np.inf))


def _noise(own: np.ndarray, k: Counts) -> np.ndarray:
    """Variance of one batch's update over the squared length of the mean."""
    signal, variance = squared_length(own, k), k @ np.diag(own) / k.sum(-1)
    return np.where(signal > 0, np.maximum(variance - signal, 0) / np.where(signal > 0, signal, 1), np.inf)


def _share(remains: np.ndarray, driven: np.ndarray, k: Counts) -> np.ndarray:
    drift, signal = (np.maximum(squared_length(products, k), 0) for products in (remains, driven))
    return drift / np.where(drift + signal > 0, drift + signal, np.nan)


def _estimate(statistic: Statistic, batches: int, parts: int, bound: float = np.inf) -> Estimate:
    """The statistic of all batches and parts, with its interval over resamples of both.

    Resamples beyond +-bound, which are undetermined, count as +-bound: the interval then says that all is possible.
    """

    def of_rows(*rows: np.ndarray, axis: int = -1) -> np.ndarray:
        counted = [(r[..., None] == np.arange(n)).sum(-2) for r, n in zip(rows, (batches, parts), strict=False)]
        return statistic(counted[0], counted[1] if len(counted) > 1 else np.ones(1))

    samples = [np.arange(batches), *([np.arange(parts)] if parts > 1 else [])]
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # where a resample is infinite, which is said
        drawn = stats.bootstrap(
            samples,
            of_rows,
            n_resamples=RESAMPLES,
            vectorized=True,
            paired=False,
            method="percentile",
            rng=np.random.default_rng(0),
        ).bootstrap_distribution
    drawn = drawn[~np.isnan(drawn)].clip(-bound, bound)
    ends = np.quantile(drawn, (0.025, 0.975), method="nearest") if len(drawn) else (np.nan, np.nan)
    return Estimate(*(float(x) if np.isfinite(x) else None for x in (of_rows(*samples), *ends)))
