"""What a run on an analytic model reports beside its sampled scores: exact points along training, and the frontier."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flowbench.config import RunConfig
from flowbench.evaluation.dev import DevScores, apart
from flowbench.evaluation.exact import COARSE_SPACING, exact_evaluation, quadratic_form
from flowbench.evaluation.protocol import within_prompt_diversity
from flowbench.models.families.plane import exact_field, on_plane
from flowbench.models.policy import Policy
from flowbench.names import path_name
from flowbench.record import Score
from flowbench.reward import Reward
from flowbench.seeding import generator_for
from flowbench.testbeds.plane.density import Gaussian, Point

REWARD, KL, SHARE, DIVERSITY = "reward", "kl", "frontier_share", "diversity"
PATH_REWARD, PATH_KL = "exact_reward", "exact_kl"
GAUSSIAN_PATH, MIXTURE_PATH = 50, 8  # points along training; a mixture's cost a fraction of a second each
SHOWN = 600  # samples in the picture


class ExactStudy:
    """Exact (E[r], KL) of a run's policy, along training and at its end, against the frontier.

    Also what scores the run at the points of its budget: prompts say nothing here, so that there need be no split
    `dev`. The diversity there is that of the samples of the picture.
    """

    def __init__(self, policy: Policy, reward: Reward, config: RunConfig, iterations: int) -> None:
        self.policy, self.config = policy, config
        form, steps = quadratic_form(reward), config.evaluation.num_steps
        self.exact = exact_evaluation(policy, form, steps)
        gaussian = isinstance(policy.transformer.density, Gaussian)
        # The path is for the picture and need not be as fine as the record.
        self.path = self.exact if gaussian else exact_evaluation(policy, form, steps, COARSE_SPACING)
        self.every = max(1, math.ceil(iterations / (GAUSSIAN_PATH if gaussian else MIXTURE_PATH)))

    def probe(self, iteration: int) -> dict[str, float]:
        """The current weights' point, as metrics of this iteration (from 1), if it is one of those on the path."""
        if iteration % self.every:
            return {}
        point = self.path.point(exact_field(self.policy))
        return {PATH_REWARD: point.reward, PATH_KL: point.kl} if point else {}

    def scores(self, splits: Sequence[str]) -> dict[str, Score]:
        """Exact scores of base and tuned model; the same for every split, because prompts say nothing here.

        Empty when the tuned sampler's map folds, see exact.py.
        """
        point = self.exact.point(exact_field(self.policy))
        if point is None:
            return {}
        values = {
            REWARD: (self.exact.frontier(point.kl).base, point.reward),
            KL: (0.0, point.kl),
            SHARE: (0.0, self.exact.share(point)),
        }
        return {
            f"{metric}/{split}": Score(base=base, tuned=tuned, diff_ci95=(tuned - base, tuned - base))
            for split in splits
            for metric, (base, tuned) in values.items()
        }

    def base(self) -> DevScores:
        """Of the model before tuning; exact where the final scores are, and the same names."""
        return self._told("reference", Point(self.exact.frontier(0.0).base, 0.0))

    def current(self) -> DevScores:
        """Of the weights in use; without the exact scores where their sampler's map folds."""
        return self._told("current", self.exact.point(exact_field(self.policy)))

    def _told(self, weights: str, point: Point | None) -> DevScores:
        with apart(self.policy):
            spread = within_prompt_diversity(self.samples(weights)[None]).item()
        means = {DIVERSITY: spread}
        if point:
            exact = {REWARD: point.reward, KL: point.kl, SHARE: self.exact.share(point) if point.kl else 0.0}
            means = {path_name(self.config.reward): point.reward, **exact, **means}
        return DevScores(means, {})

    @torch.no_grad()
    def samples(self, weights: str) -> torch.Tensor:
        """Points (N, 2) of a weight view, from the same noise for all of them."""
        self.policy.generator = generator_for(self.config.protocol().seed, "frontier-samples")
        noise, cond = self.policy.draw_noise(SHOWN), self.policy.encode([""] * SHOWN)
        samples = self.policy.rollout(cond, noise, num_steps=self.config.evaluation.num_steps, weights=weights)
        return samples.x0.flatten(1).cpu()


def exact_study(policy: Policy, reward: Reward, config: RunConfig, iterations: int = 1) -> ExactStudy | None:
    """The study of a run of so many iterations on an analytic model; None for every other model."""
    return ExactStudy(policy, reward, config, iterations) if on_plane(policy) else None
