"""Where ORW-CFM-W2 comes to rest on the Gaussian: theory's fixed point against runs of the trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowbench.conformance.rest import ending
from flowbench.evaluation.exact import exact_evaluation, sampled_gaussian
from flowbench.models.families.plane import exact_field
from flowbench.models.families.plane_field import VelocityField
from flowbench.models.policy import Policy
from flowbench.scoring.combination import WeightedSum
from flowbench.terms import parse_reward
from flowbench.testbeds.plane.density import Gaussian, Point, QuadraticForm
from flowbench.training.trainer import Trainer

Form = Callable[..., QuadraticForm]
NODES, ROUNDS = 48, 30


def regression(field: VelocityField, samples: Gaussian, reward: QuadraticForm, tau: float, alpha: float) -> None:
    """Set the field to the exact minimiser of ORW's objective on these samples, among fields affine in x.

    With w / E[w] the weighted samples are the tilted Gaussian, with mass 1; every expectation is that of a Gaussian.
    Sigmas are the midpoints of equal parts of [0, 1].
    """
    reference, correction = field.density, field.correction
    assert isinstance(reference, Gaussian)
    tilted, eye = samples.tilt(reward, 1 / tau), torch.eye(2).double()
    matrix, right = torch.zeros(18, 18).double(), torch.zeros(18, 2).double()
    for k in range(NODES):
        s = torch.tensor([(k + 0.5) / NODES]).double()
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


def fixed_point(policy: Policy, reward: QuadraticForm, tau: float, alpha: float, standardized: bool) -> Point:
    """Where samples and regression no longer move each other; its reward is the gain.

    Standardized rewards have a deviation of 1 there: a long run's deviation is that of the samples it rests at.
    """
    field, sigmas = exact_field(policy), policy.sigmas(policy.preset.num_steps).double()
    evaluation = exact_evaluation(policy, reward)
    base, rewards = evaluation.frontier(0.0).base, [0.0]
    for _ in range(ROUNDS):
        samples = sampled_gaussian(field, sigmas)
        unit = (reward.linear @ samples.covariance @ reward.linear).sqrt().item() if standardized else 1.0
        regression(field, samples, reward, tau / unit, alpha)
        point = evaluation.point(field)
        assert point is not None
        rewards.append(point.reward)
    assert abs(rewards[-1] - rewards[-2]) < 1e-3 * rewards[-1]
    return Point(point.reward - base, point.kl)


STANDARDIZED: dict[str, Any] = {
    "training__reward_scale": "standardized",
    "algorithm__tau": 1.0,
    "algorithm__alpha": 1.0,
}


@pytest.mark.parametrize("settings", [{}, STANDARDIZED], ids=["defaults", "standardized"])
def test_orw_comes_to_rest_where_theory_says(
    make_analytic_trainer: Callable[..., Trainer],
    make_analytic_policy: Callable[..., Policy],
    form: Form,
    settings: dict[str, Any],
):
    """The mean over a run's last fifth against the fixed point of exact regressions on exact samples.

    Over five seeds that mean had a deviation of 4 % in E[r] and 8 % in KL, so that 15 % and 30 % are allowed.
    """
    trainer = make_analytic_trainer("orw-cfm-w2", **settings)
    if settings:
        trainer.reward = WeightedSum(parse_reward("linear"), {"linear": trainer.reward}, standardized=True)
        trainer.collector.reward = trainer.reward
    end, reward = ending(trainer, form("linear")), form("linear")
    assert end is not None
    config = trainer.algorithm.cfg
    theory = fixed_point(make_analytic_policy(), reward, config.tau, config.alpha, bool(settings))
    assert end.last.reward == pytest.approx(theory.reward, rel=0.15)
    assert end.last.kl == pytest.approx(theory.kl, rel=0.3)
