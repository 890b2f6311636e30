"""What an algorithm learns on an analytic model, against what theory allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from flowbench.evaluation.exact import exact_evaluation, quadratic_form
from flowbench.models.families.plane import exact_field
from flowbench.models.policy import Policy
from flowbench.reward import Reward
from flowbench.seeding import generator_for
from flowbench.training.trainer import Trainer

SEEDS = 3
SAMPLES = 20_000


@dataclass(frozen=True)
class Learned:
    """Where one run ended.

    gain: exact E[r] minus the reference's; kl: exact, in nats, from an untouched reference; best: the frontier's gain
    at that KL; sampled: the gain in samples, and standard_error its own. None where the sampler's map has no density.
    """

    seed: int
    gain: float | None
    kl: float | None
    best: float | None
    sampled: float
    standard_error: float


def measure(trainer: Trainer, untouched: Policy, reward: Reward) -> Learned:
    """Train to the end, and evaluate against an untouched policy of the same model."""
    trainer.run()
    trainer.updater.use_average()
    tuned, seed = trainer.policy, trainer.config.seed
    exact = exact_evaluation(untouched, quadratic_form(reward))
    base = exact.frontier(0.0).base
    point = exact.point(exact_field(tuned))
    tuned.generator = generator_for("check", seed)
    prompts = ("",) * SAMPLES
    with torch.no_grad():
        points = tuned.decode(tuned.rollout(tuned.encode(prompts), tuned.draw_noise(SAMPLES)).x0)
        rewards = reward.score(points, prompts).double()
    return Learned(
        seed=seed,
        gain=point.reward - base if point else None,
        kl=point.kl if point else None,
        best=exact.frontier(point.kl).gain(point.kl) if point else None,
        sampled=rewards.mean().item() - base,
        standard_error=rewards.std().item() / math.sqrt(SAMPLES),
    )


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of values (n,) by Student's t; (mean, mean) when all are equal."""
    mean, error = float(values.mean()), float(stats.sem(values))
    if error == 0:
        return mean, mean
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)
    return float(low), float(high)
