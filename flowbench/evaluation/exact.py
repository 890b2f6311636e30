"""Exact E[r] and KL(p_theta || p_ref) of what the Euler sampler makes of a velocity field, against the frontier.

The sampler with its finite number of steps is a map T from noise to points, for the tuned field and for the reference
alike. Densities follow by change of variables, log p(T(z)) = log N(z; 0, I) - log |det DT(z)|, so that the reference is
the distribution that the reference sampler really has, and nothing is gained or lost by discretisation alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import pairwise

import torch

from flowbench.errors import RunError
from flowbench.models.families.plane import exact_field
from flowbench.models.families.plane_field import VelocityField
from flowbench.models.policy import Policy
from flowbench.reward import Reward
from flowbench.scoring.combination import WeightedSum
from flowbench.testbeds.plane.density import Frontier, Gaussian, GaussianMixture, Point, QuadraticForm, frontier

REACH = 6.0  # of the nodes in noise space, in standard deviations
SPACING, COARSE_SPACING = 0.2, 0.4  # of the nodes
MOST_NODES = 300_000
FOLDED = 1e-4  # share of the noise at which a map that folds has no usable density
NEWTON_STEPS, NEWTON_TOLERANCE = 60, 1e-11


def quadratic_form(reward: Reward) -> QuadraticForm:
    """The quadratic form behind a reward of points, or behind a weighted sum of such.

    Raises RunError for a reward that has none.
    """
    if isinstance(reward, WeightedSum):
        forms = {name: quadratic_form(part) for name, part in reward.rewards.items()}
        return sum_of_forms([(weight, forms[name]) for name, weight in reward.coefficients.items()])
    if not hasattr(reward, "form"):
        raise RunError(f"reward '{reward.info.name}' has no quadratic form; derive it from PointReward")
    form: QuadraticForm = reward.form()
    return form


def sum_of_forms(parts: list[tuple[float, QuadraticForm]]) -> QuadraticForm:
    """The weighted sum of quadratic forms, which is one."""
    return QuadraticForm(
        torch.stack([w * f.linear for w, f in parts]).sum(0),
        torch.stack([w * f.curvature for w, f in parts]).sum(0),
        sum(w * f.constant for w, f in parts),
    )


class ExactEvaluation(ABC):
    """Points (E[r], KL) of velocity fields against one reference field, at the sampler's sigmas (T + 1,)."""

    @abstractmethod
    def frontier(self, kl: float) -> Frontier:
        """The frontier, exact up to this KL."""

    @abstractmethod
    def point(self, field: VelocityField) -> Point | None:
        """Where the field's samples stand; None if they have no density, because the map folds or collapses."""

    def share(self, point: Point) -> float:
        """Gain over the reference as a share of the frontier's gain at the same KL; 0 at the reference itself."""
        frontier = self.frontier(point.kl)
        best = frontier.gain(point.kl)
        return (point.reward - frontier.base) / best if best > 0 else 0.0


def exact_evaluation(
    policy: Policy, reward: QuadraticForm, num_steps: int | None = None, spacing: float = SPACING
) -> ExactEvaluation:
    """The evaluation that fits the policy's reference: closed form for a Gaussian, nodes of quadrature for a mixture.

    num_steps None is the model's own number of sampler steps.
    """
    sigmas = policy.sigmas(num_steps or policy.preset.num_steps).double().cpu()
    reference = exact_field(policy, "reference")
    if isinstance(reference.density, Gaussian):
        return GaussianEvaluation(reference, sigmas, reward)
    return GridEvaluation(reference, sigmas, reward, spacing)


class GaussianEvaluation(ExactEvaluation):
    """Fields that are affine in x: the sampler's map is affine too, and its distribution a Gaussian."""

    def __init__(self, reference: VelocityField, sigmas: torch.Tensor, reward: QuadraticForm) -> None:
        self.sigmas, self.reward = sigmas, reward
        self.reference = sampled_gaussian(reference, sigmas)

    def frontier(self, kl: float) -> Frontier:
        """As in the base class; here exact everywhere."""
        return frontier(self.reference, self.reward)

    def point(self, field: VelocityField) -> Point | None:
        """As in the base class."""
        sampled = sampled_gaussian(field, self.sigmas)
        if not torch.linalg.det(sampled.covariance) > 0:
            return None
        return _point(sampled.expected(self.reward), sampled.kl(self.reference))


@torch.no_grad()
def sampled_gaussian(field: VelocityField, sigmas: torch.Tensor) -> Gaussian:
    """The distribution of the ODE sampler's points for a field that is affine in x."""
    width = field.density.width
    eye, mean, gain = torch.eye(width).double(), torch.zeros(width).double(), torch.eye(width).double()
    for sigma, sigma_next in pairwise(sigmas):
        values = field(torch.cat([torch.zeros(1, width).double(), eye]), sigma.expand(width + 1))
        slope, d = (values[1:] - values[0]).T, sigma_next - sigma
        mean = mean + d * (slope @ mean + values[0])
        gain = gain + d * slope @ gain
    return Gaussian(mean, gain @ gain.T)


class GridEvaluation(ExactEvaluation):
    """Fields of a mixture: expectations over noise by the trapezoid rule, which converges exponentially."""

    def __init__(self, reference: VelocityField, sigmas: torch.Tensor, reward: QuadraticForm, spacing: float) -> None:
        assert isinstance(reference.density, GaussianMixture)
        self.density, self.sigmas, self.reward = reference.density, sigmas, reward
        self.spacing, self.z = spacing, disc(REACH, spacing)
        self.log_weight = _log_normal(self.z).log_softmax(0)

    def frontier(self, kl: float) -> Frontier:
        """As in the base class; with curvature up to about 6 nats, where the optimum is narrower than the nodes."""
        # The optimum at this KL lies up to sqrt(2 KL) standard deviations away, or is narrower by exp(-(KL + 1) / 2).
        reach = REACH + 3 + math.sqrt(2 * kl)
        spacing = min(self.spacing, math.exp(-(kl + 1) / 2)) if self.reward.curvature.any() else self.spacing
        z = disc(reach, max(spacing, reach * math.sqrt(math.pi / MOST_NODES)))
        rewards, log_weight = self.reward(_sample(self.density, self.sigmas, z)), _log_normal(z).log_softmax(0)
        return Frontier(lambda scale: (log_weight + scale * rewards).logsumexp(0))

    def point(self, field: VelocityField) -> Point | None:
        """As in the base class."""
        weight = self.log_weight.exp()
        x, log_det, folded = push(field, self.sigmas, self.z)
        if weight[folded].sum() > FOLDED or not x.isfinite().all():
            return None
        z_ref, log_det_ref = pull(self.density, self.sigmas, x)
        log_ratio = _log_normal(self.z) - log_det - (_log_normal(z_ref) - log_det_ref)
        return _point((weight * self.reward(x)).sum().item(), (weight * log_ratio).sum().item())


def _point(reward: float, kl: float) -> Point | None:
    return Point(reward, max(kl, 0.0)) if math.isfinite(reward) and math.isfinite(kl) else None


def disc(reach: float, spacing: float) -> torch.Tensor:
    """The nodes (N, 2) of a square lattice within a distance of 0."""
    axis = torch.arange(-reach, reach + spacing / 2, spacing, dtype=torch.float64)
    nodes = torch.cartesian_prod(axis, axis)
    return nodes[nodes.norm(dim=1) <= reach]


def _log_normal(z: torch.Tensor) -> torch.Tensor:
    return -0.5 * z.square().sum(1) - z.shape[1] / 2 * math.log(2 * math.pi)


@torch.no_grad()
def _sample(density: GaussianMixture, sigmas: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    x = z
    for sigma, sigma_next in pairwise(sigmas):
        x = x + (sigma_next - sigma) * density.velocity(x, sigma.expand(len(x)))
    return x


@torch.no_grad()
def push(
    field: VelocityField, sigmas: torch.Tensor, z: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the ODE sampler takes noise z (N, 2), log |det| of that map (N,), and whether it folds there (N,).

    It folds where a step's determinant is not positive.
    """
    x, log_det, folded = z, torch.zeros(len(z)).to(z), torch.zeros(len(z), dtype=torch.bool)
    for sigma, sigma_next in pairwise(sigmas):
        v, jacobian = _step(field, x, sigma, sigma_next)
        det = _det(jacobian)
        x, log_det, folded = x + (sigma_next - sigma) * v, log_det + det.abs().log(), folded | (det <= 0)
    return x, log_det, folded


@torch.no_grad()
def pull(density: GaussianMixture, sigmas: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise z (N, 2) that the exact field's ODE sampler takes to x (N, 2), and log |det| of the map at z (N,).

    Every step of an exact field is the gradient of a convex function, hence invertible; Newton's method inverts it.
    Raises RunError where it does not converge.
    """
    log_det = torch.zeros(len(x)).to(x)
    for sigma, sigma_next in reversed(list(pairwise(sigmas))):
        target = x
        for _ in range(NEWTON_STEPS):
            v, jacobian = _step(density, x, sigma, sigma_next)
            error = x + (sigma_next - sigma) * v - target
            if (error.abs() / (1 + target.abs())).max() < NEWTON_TOLERANCE:
                break
            x = x - _solve(jacobian, error)
        else:
            raise RunError(f"the reference sampler's step at sigma {sigma:.3f} could not be inverted for all points")
        log_det = log_det + _det(jacobian).log()
    return x, log_det


def _step(
    field: VelocityField | GaussianMixture, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """v (N, 2), and the Jacobian (N, 2, 2) of the Euler step."""
    v, slope = field.linearized(x, sigma.expand(len(x)))
    return v, torch.eye(2).to(x) + (sigma_next - sigma) * slope


def _det(m: torch.Tensor) -> torch.Tensor:
    return m[:, 0, 0] * m[:, 1, 1] - m[:, 0, 1] * m[:, 1, 0]


def _solve(m: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cramer's rule for m (N, 2, 2), b (N, 2)."""
    first = m[:, 1, 1] * b[:, 0] - m[:, 0, 1] * b[:, 1]
    second = m[:, 0, 0] * b[:, 1] - m[:, 1, 0] * b[:, 0]
    return torch.stack([first, second], 1) / _det(m)[:, None]
