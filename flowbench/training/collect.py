"""The first half of an iteration: prompts are drawn, images generated and scored."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from flowbench.algorithm import Algorithm
from flowbench.config import RunConfig, TrainingConfig
from flowbench.models.policy import Policy
from flowbench.prompts import Prompt
from flowbench.reward import Reward, check_signal, checked_score
from flowbench.rollout import Rollout, RolloutPlan
from flowbench.seeding import generator_for
from flowbench.training.budget import Budget


class Collector:
    """Generates and scores the images of one iteration after another."""

    def __init__(
        self, config: RunConfig, policy: Policy, algorithm: Algorithm, reward: Reward, prompts: tuple[Prompt, ...]
    ) -> None:
        self.config, self.policy, self.algorithm, self.reward, self.prompts = config, policy, algorithm, reward, prompts

    def collect(self, iteration: int, budget: Budget) -> Rollout:
        """The scored images of iteration `iteration`, counted from 0.

        Raises RunError for a score that is not finite, or scores that say nothing.
        """
        training, seed, device = self.config.training, self.config.seed, self.policy.device
        group, prompts = self._draw_prompts(iteration)
        needs, plan = self.algorithm.needs(), self.algorithm.plan()
        self.policy.generator = generator_for(seed, "rollout", iteration)
        with self.policy.rollout_precision(), budget.timed("rollout", device):
            cond = self.policy.encode(prompts)
            samples = self.policy.rollout(
                cond,
                self._draw_noise(group, plan),
                sampler=self.policy.sampler,
                num_steps=self.policy.num_steps,
                guidance_scale=training.guidance_scale,
                window=stochastic_steps(training, self.policy.num_steps, seed, iteration),
                keep_states=bool(needs & {"states", "log_prob"}),
                weights="old" if "old" in needs else "current",
                group=group.to(device),
                branch_step=plan.branch_step,
                keep_steps=plan.keep_steps,
            )
        with self.policy.rollout_precision(), budget.timed("decode", device), torch.no_grad():
            images = torch.cat([self.policy.decode(part) for part in samples.x0.split(training.decode_batch)])
        with budget.timed("reward", device):
            scores = self._scores(images, prompts, iteration, budget)
        self.reward.observe(scores)
        return Rollout(
            iteration=iteration,
            prompts=prompts,
            group=group.to(device),
            cond=cond,
            sigmas=samples.sigmas,
            x0=samples.x0,
            images=images,
            reward=self.reward.combine(scores),
            components=scores,
            states=samples.states,
            log_prob=samples.log_prob,
            step_mean=samples.mean,
            step_std=samples.std,
        )

    def _draw_noise(self, group: torch.Tensor, plan: RolloutPlan) -> torch.Tensor:
        """The first noise (B, C, h, w) of images with these groups (B,)."""
        if not plan.shared_noise:
            return self.policy.draw_noise(len(group))
        return self.policy.draw_noise(int(group.max()) + 1)[group.to(self.policy.device)]

    def _draw_prompts(self, iteration: int) -> tuple[torch.Tensor, tuple[Prompt, ...]]:
        """The group (B,) of each image of an iteration, and its prompt; all prompts before one comes twice."""
        training = self.config.training
        chosen = torch.randperm(len(self.prompts), generator=generator_for(self.config.seed, "prompts", iteration))
        count = training.prompts_per_iteration
        chosen = chosen.repeat(math.ceil(count / len(chosen)))[:count]
        group = torch.arange(count).repeat_interleave(training.images_per_prompt)
        return group, tuple(self.prompts[chosen[g]] for g in group)

    @torch.no_grad()
    def _scores(
        self, images: torch.Tensor, prompts: tuple[str, ...], iteration: int, budget: Budget
    ) -> dict[str, torch.Tensor]:
        """Raw scores (B,) of all images by each part of the reward."""
        size, scores = self.config.training.decode_batch, {}
        for name, part in self.reward.parts().items():
            batches = zip(images.split(size), _split(prompts, size), strict=True)
            scores[name] = torch.cat([checked_score(part, x, texts) for x, texts in batches])
            check_signal(part.info, scores[name], iteration + 1)
            budget.reward_calls += len(prompts)
        return scores


def stochastic_steps(training: TrainingConfig, num_steps: int, seed: int, iteration: int) -> range | None:
    """MixGRPO's window (2507.21802) of stochastic sampler steps in an iteration; None is all of them.

    The last step is never in it, as in the reference implementations of MixGRPO and Flow-GRPO.
    """
    size = training.sde_window
    if size is None:
        return None
    places = num_steps - size
    if training.sde_window_stay is None:
        start = int(torch.randint(places, (1,), generator=generator_for(seed, "sde-window", iteration)))
    else:
        start = iteration // training.sde_window_stay % places
    return range(start, start + size)


def _split(prompts: tuple[str, ...], size: int) -> Iterator[tuple[str, ...]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]
