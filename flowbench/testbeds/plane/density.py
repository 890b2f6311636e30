"""Densities in R^D with all that theory asks of them in closed form: velocity, tilting by a reward, KL, frontier.

Notation of flow.py. Points are (N, D). Rewards are quadratic forms, of which a linear reward is the one without
curvature. The KL-regularised optimum of E[r] - beta KL(p || p_ref) is p* proportional to p_ref exp(r / beta); over all
beta its points (KL, E[r]) are the frontier, which no distribution can pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from flowbench.errors import UsageError, did_you_mean

LARGEST_SCALE = 1e6  # of 1 / beta, when a frontier is searched for a KL


@dataclass(frozen=True)
class QuadraticForm:
    """r(x) = constant + linear . x - x' curvature x / 2; linear (D,), curvature (D, D) symmetric, float64."""

    linear: torch.Tensor
    curvature: torch.Tensor
    constant: float = 0.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """r of points (N, D), (N,)."""
        c, q = self.linear.to(x), self.curvature.to(x)
        return self.constant + x @ c - ((x @ q) * x).sum(1) / 2


@dataclass(frozen=True)
class _Noised:
    """x_sigma of K Gaussians; in the eigenvectors of their covariances S all is diagonal.

    mean, spectrum (K, 1, D), vectors (K, D, D).
    """

    mean: torch.Tensor
    spectrum: torch.Tensor
    vectors: torch.Tensor

    @classmethod
    def of(cls, components: Sequence[Gaussian]) -> _Noised:
        """The paths of these components."""
        spectrum, vectors = torch.linalg.eigh(torch.stack([g.covariance for g in components]))
        return cls(torch.stack([g.mean for g in components])[:, None], spectrum[:, None], vectors)

    def at(self, x: torch.Tensor, sigma: torch.Tensor | None) -> _State:
        """What is known at x (N, D) and sigma (N,); None is 0."""
        s = torch.zeros(len(x), 1).to(x) if sigma is None else sigma[:, None]
        mean, spectrum, vectors = self.mean.to(x), self.spectrum.to(x), self.vectors.to(x)
        y = (x - (1 - s) * mean) @ vectors
        return _State(mean, vectors, y, (1 - s) ** 2 * spectrum + s**2, s - (1 - s) * spectrum)


@dataclass(frozen=True)
class _State:
    """x_sigma - (1 - sigma) mean in the eigenvectors, y, with the eigenvalues of S_sigma (spread) and of
    sigma I - (1 - sigma) S (lean); all (K, N, D)."""

    mean: torch.Tensor
    vectors: torch.Tensor
    y: torch.Tensor
    spread: torch.Tensor
    lean: torch.Tensor

    @property
    def log_prob(self) -> torch.Tensor:
        """Log-density of each component, (K, N)."""
        return -0.5 * ((self.y.square() / self.spread) + (2 * math.pi * self.spread).log()).sum(2)

    @property
    def velocity(self) -> torch.Tensor:
        """Velocity of each component, (K, N, D)."""
        return (self.y * self.lean / self.spread) @ self.vectors.mT - self.mean

    @property
    def slope(self) -> torch.Tensor:
        """dv/dx of each component, (K, N, D, D)."""
        gain = self.lean / self.spread
        return (self.vectors[:, None] * gain[:, :, None]) @ self.vectors[:, None].mT

    @property
    def score(self) -> torch.Tensor:
        """Gradient of each component's log-density, (K, N, D)."""
        return -(self.y / self.spread) @ self.vectors.mT


@dataclass(frozen=True)
class Gaussian:
    """N(mean, covariance); mean (D,), covariance (D, D) positive definite, float64."""

    mean: torch.Tensor
    covariance: torch.Tensor

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean)

    @cached_property
    def _noised(self) -> _Noised:
        return _Noised.of([self])

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """n points (n, D)."""
        noise = torch.randn(n, len(self.mean), generator=generator, dtype=self.mean.dtype)
        return self.mean + noise @ torch.linalg.cholesky(self.covariance).T

    def log_prob(self, x: torch.Tensor, sigma: torch.Tensor | None = None) -> torch.Tensor:
        """Log-density (N,) of x (N, D): of the data, or with sigma (N,) of x_sigma = (1 - sigma) x0 + sigma eps."""
        return self._noised.at(x, sigma).log_prob[0]

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """v(x, sigma) = E[eps - x0 | x_sigma = x]; x (N, D), sigma (N,).

        -mean + (sigma I - (1 - sigma) S) S_sigma^-1 (x - (1 - sigma) mean), S_sigma = (1 - sigma)^2 S + sigma^2 I.
        """
        return self._noised.at(x, sigma).velocity[0]

    def expected(self, reward: QuadraticForm) -> float:
        """E[r]."""
        trace = (reward.curvature * self.covariance).sum()
        return (reward(self.mean[None])[0] - trace / 2).item()

    def log_partition(self, reward: QuadraticForm, scale: torch.Tensor) -> torch.Tensor:
        """log E[exp(scale r)], differentiable in the scalar `scale`."""
        precision, eye = torch.linalg.inv(self.covariance), torch.eye(len(self.mean)).to(self.mean)
        shift = precision @ self.mean + scale * reward.linear
        tilted = torch.linalg.solve(precision + scale * reward.curvature, shift)
        log_det = torch.logdet(eye + scale * self.covariance @ reward.curvature)
        return scale * reward.constant + (shift @ tilted - self.mean @ precision @ self.mean - log_det) / 2

    def tilt(self, reward: QuadraticForm, beta: float) -> Gaussian:
        """The density proportional to p exp(r / beta): S* = (S^-1 + Q / beta)^-1, mean* = S* (S^-1 mean + c / beta)."""
        precision = torch.linalg.inv(self.covariance)
        covariance = torch.linalg.inv(precision + reward.curvature / beta)
        return Gaussian(covariance @ (precision @ self.mean + reward.linear / beta), covariance)

    def kl(self, other: Gaussian) -> float:
        """KL(self || other)."""
        inverse = torch.linalg.inv(other.covariance)
        ratio, offset = inverse @ self.covariance, self.mean - other.mean
        return ((ratio.trace() - len(offset) + offset @ inverse @ offset - torch.logdet(ratio)) / 2).item()


@dataclass(frozen=True)
class GaussianMixture:
    """Sum of weights_k N(mean_k, covariance_k); weights (K,) positive, with sum 1, float64."""

    weights: torch.Tensor
    components: tuple[Gaussian, ...]

    @property
    def width(self) -> int:
        """D."""
        return self.components[0].width

    @cached_property
    def _noised(self) -> _Noised:
        return _Noised.of(self.components)

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """n points (n, D)."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        draws = torch.stack([g.sample(n, generator) for g in self.components])
        return draws[which, torch.arange(n)]

    def log_prob(self, x: torch.Tensor, sigma: torch.Tensor | None = None) -> torch.Tensor:
        """Log-density (N,) of x (N, D): of the data, or with sigma (N,) of x_sigma."""
        return self._joint(self._noised.at(x, sigma)).logsumexp(0)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """v(x, sigma): the components' velocities, weighted by their share of the density; x (N, D), sigma (N,)."""
        state = self._noised.at(x, sigma)
        return (self._joint(state).softmax(0)[:, :, None] * state.velocity).sum(0)

    def linearized(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """v (N, D) and its slope dv/dx (N, D, D)."""
        state = self._noised.at(x, sigma)
        share, v, score = self._joint(state).softmax(0)[:, :, None], state.velocity, state.score
        relative = score - (share * score).sum(0)  # the shares move with x, too
        slope = (share[..., None] * (state.slope + v[..., :, None] * relative[..., None, :])).sum(0)
        return (share * v).sum(0), slope

    def _joint(self, state: _State) -> torch.Tensor:
        """Log of weight times density of each component, (K, N)."""
        return state.log_prob + self.weights.to(state.y).log()[:, None]

    def expected(self, reward: QuadraticForm) -> float:
        """E[r]."""
        return sum(w * g.expected(reward) for w, g in zip(self.weights.tolist(), self.components, strict=True))

    def log_partition(self, reward: QuadraticForm, scale: torch.Tensor) -> torch.Tensor:
        """log E[exp(scale r)], differentiable in the scalar `scale`."""
        parts = torch.stack([g.log_partition(reward, scale) for g in self.components])
        return (parts + self.weights.log()).logsumexp(0)

    def tilt(self, reward: QuadraticForm, beta: float) -> GaussianMixture:
        """The density proportional to p exp(r / beta): each component tilted, weights_k times its partition."""
        scale = torch.tensor(1 / beta, dtype=torch.float64)
        parts = torch.stack([g.log_partition(reward, scale) for g in self.components])
        weights = (parts + self.weights.log()).softmax(0)
        return GaussianMixture(weights, tuple(g.tilt(reward, beta) for g in self.components))


Density = Gaussian | GaussianMixture


@dataclass(frozen=True)
class Point:
    """Where a distribution stands: E[r] under it, and its KL from the reference in nats."""

    reward: float
    kl: float


@dataclass(frozen=True)
class Frontier:
    """The best E[r] that any distribution reaches at a given KL from the reference.

    cumulant: K(scale) = log E_ref[exp(scale r)] of a scalar float64 tensor. With scale = 1 / beta the tilted optimum
    has E[r] = K' and KL = scale K' - K.
    """

    cumulant: Callable[[torch.Tensor], torch.Tensor]

    def at(self, scale: float) -> Point:
        """The optimum's point for beta = 1 / scale."""
        with torch.enable_grad():
            s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
            k = self.cumulant(s)
            (reward,) = torch.autograd.grad(k, s)
        return Point(reward.item(), max(scale * reward.item() - k.item(), 0.0))

    @cached_property
    def base(self) -> float:
        """E[r] under the reference."""
        return self.at(0.0).reward

    def gain(self, kl: float) -> float:
        """The largest E[r] - E_ref[r] at this KL (nats); the supremum's approximation where no tilting goes so far."""
        from scipy.optimize import brentq

        if kl <= 0:
            return 0.0
        high = 1.0
        while self.at(high).kl < kl and high < LARGEST_SCALE:
            high *= 2
        if self.at(high).kl < kl:
            return self.at(high).reward - self.base
        return self.at(brentq(lambda scale: self.at(scale).kl - kl, 0.0, high, xtol=1e-12)).reward - self.base


def frontier(density: Density, reward: QuadraticForm) -> Frontier:
    """The frontier of a reference density; for a linear reward on a Gaussian gain(KL) = sqrt(2 c'Sc KL)."""
    return Frontier(lambda scale: density.log_partition(reward, scale))


def _gaussian(mean: Sequence[float], covariance: Sequence[Sequence[float]]) -> Gaussian:
    m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64)
    if s.shape != (len(m), len(m)):
        raise ValueError(f"the mean has {len(m)} dimensions, the covariance {len(s)}")
    if not torch.equal(s, s.T) or torch.linalg.eigvalsh(s).min() <= 0:
        raise ValueError("the covariance is not positive definite")
    return Gaussian(m, s)


def _mixture(weights: Sequence[float], means: Sequence[Sequence[float]], std: float) -> GaussianMixture:
    """Isotropic components of one standard deviation."""
    w = torch.tensor(weights, dtype=torch.float64)
    if len(w) != len(means) or w.min() <= 0:
        raise ValueError("the weights must be positive, one per mean")
    components = [_gaussian(m, [[std**2 * (i == j) for j in range(len(m))] for i in range(len(m))]) for m in means]
    return GaussianMixture(w / w.sum(), tuple(components))


DENSITIES: dict[str, Callable[..., Density]] = {"gaussian": _gaussian, "mixture": _mixture}


def make_density(kind: str, parameters: dict[str, Any]) -> Density:
    """The density that a model's preset describes.

    Raises UsageError for an unknown kind or parameters that do not fit.
    """
    if kind not in DENSITIES:
        raise UsageError(f"unknown density 'analytic:{kind}'{did_you_mean(kind, DENSITIES)}")
    try:
        return DENSITIES[kind](**parameters)
    except (TypeError, ValueError) as error:
        raise UsageError(f"density 'analytic:{kind}': {error}") from error
