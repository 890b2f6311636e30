"""Where ORW-CFM-W2 comes to rest on the Gaussian: theory's fixed point against runs of the trainer."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import pytest
import torch

from flowbench.evaluation.exact import exact_evaluation, sampled_gaussian
from flowbench.models.families.plane import exact_field
from flowbench.models.families.plane_field import VelocityField
from flowbench.models.policy import Policy
from flowbench.testbeds.plane.density import Gaussian, Point, QuadraticForm
from flowbench.training.trainer import Trainer

NODES, ROUNDS = 96, 40


def regression(field: VelocityField, samples: Gaussian, reward: QuadraticForm, tau: float, alpha: float) -> None:
    """Set the field to the exact minimiser of ORW's objective on these samples, among fields affine in x.

    With w / E[w] the weighted samples are the tilted Gaussian, with mass 1; every expectation is that of a Gaussian.
    Sigmas are the quantiles of the standard logit-normal.
    """
    reference, correction = field.density, field.correction
    assert isinstance(reference, Gaussian)
    tilted, eye = samples.tilt(reward, 1 / tau), torch.eye(2).double()
    matrix, right = torch.zeros(18, 18).double(), torch.zeros(18, 2).double()
    for k in range(NODES):
        s = torch.tensor([NormalDist().inv_cdf((k + 0.5) / NODES)]).double().sigmoid()
        basis = correction.basis(s)[0]
        v_ref = reference.velocity(torch.cat([torch.zeros(1, 2).double(), eye]), s.expand(3))
        v_ref = torch.cat([v_ref[:1], v_ref[1:] - v_ref[:1]])  # (1, x) v_ref
        moments = []
        for g in (tilted, samples):
            mean = torch.cat([torch.ones(1), (1 - s) * g.mean])
            covariance = torch.zeros(3, 3).double()
            covariance[1:, 1:] = (1 - s) ** 2 * g.covariance + s**2 * eye
            moments.append(covariance + torch.outer(mean, mean))  # of (1, x)
        mean, with_u = torch.cat([torch.ones(1), (1 - s) * tilted.mean]), torch.zeros(3, 2).double()
        with_u[1:] = s * eye - (1 - s) * tilted.covariance
        with_u = with_u - torch.outer(mean, tilted.mean)  # E[(1, x) u'], u = eps - x0
        matrix += torch.kron(torch.outer(basis, basis), moments[0] + alpha * moments[1])
        right += torch.kron(basis[:, None], with_u - moments[0] @ v_ref)
    solution = torch.linalg.solve(matrix, right).view(6, 3, 2)
    correction.shift.data = solution[:, 0]
    correction.gain.data = solution[:, 1:].mT


def fixed_point(policy: Policy, reward: QuadraticForm, tau: float, alpha: float) -> Point:
    """Where samples and regression no longer move each other."""
    field, sigmas = exact_field(policy), policy.sigmas(policy.preset.num_steps).double()
    evaluation = exact_evaluation(policy, reward)
    before = Point(0.0, 0.0)
    for _ in range(ROUNDS):
        regression(field, sampled_gaussian(field, sigmas), reward, tau, alpha)
        point = evaluation.point(field)
        assert point is not None
        before, change = point, abs(point.reward - before.reward) + abs(point.kl - before.kl)
    assert change < 1e-6
    return before
