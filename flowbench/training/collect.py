"""The first half of an iteration: prompts are drawn, images generated and scored, in portions that fit the device.

What an iteration keeps of latents and images lies in host memory where the model is on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from flowbench.algorithm import Algorithm
from flowbench.config import RunConfig, TrainingConfig
from flowbench.models.memory import Portion
from flowbench.models.policy import Policy, Samples
from flowbench.prompts import Prompt
from flowbench.reward import Reward, check_signal, checked_score
from flowbench.rollout import Conditioning, Rollout, RolloutPlan
from flowbench.seeding import generator_for
from flowbench.stored import HOST, Shelf
from flowbench.training.budget import Budget
from flowbench.training.processes import joined, own_groups


class Collector:
    """Generates and scores the images of one iteration after another."""

    def __init__(
        self, config: RunConfig, policy: Policy, algorithm: Algorithm, reward: Reward, prompts: tuple[Prompt, ...]
    ) -> None:
        self.config, self.policy, self.algorithm, self.reward, self.prompts = config, policy, algorithm, reward, prompts
        self.sampling = Portion("the rollout", config.training.rollout_batch, ledger=policy.evaluations)
        self.decoding = Portion("decoding", config.training.decode_batch)
        self.scoring = Portion("scoring", config.training.decode_batch)

    def collect(self, iteration: int, budget: Budget) -> Rollout:
        """The scored images of iteration `iteration`, counted from 0.

        Raises RunError for a score that is not finite, or scores that say nothing.
        """
        self._let_rewards_rest()  # an update may have asked them
        seed, device = self.config.seed, self.policy.device
        group, prompts = self._draw_prompts(iteration)
        processes = self.policy.processes
        groups, mine = own_groups(processes, self.config.training)
        self.policy.generator = generator_for(seed, "rollout", iteration)
        draws = processes.drawing(groups, self.config.training.prompts_per_iteration)
        with self.policy.rollout_precision(), budget.timed("rollout", device), draws:
            cond = self.policy.encode(prompts)
            samples = self._sampled(cond.select(torch.arange(len(group))[mine]), group[mine], iteration)
        with self.policy.rollout_precision(), budget.timed("decode", device), torch.no_grad():
            images = self._decoded(samples.x0)
        with budget.timed("reward", device):
            scores = self._scores(images, prompts[mine], budget)
        self._let_rewards_rest()
        samples, images, scores = joined(processes, samples, images, scores)
        for name, part in self.reward.parts().items():
            check_signal(part.info, scores[name], iteration + 1)
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

    def _sampled(self, cond: Conditioning, group: torch.Tensor, iteration: int) -> Samples:
        """The rollout of images with this conditioning and these groups (B,), portion by portion.

        All of its noise is drawn first, so that it does not depend on the portions.
        """
        training, policy, needs, plan = self.config.training, self.policy, self.algorithm.needs(), self.algorithm.plan()
        window = stochastic_steps(training, policy.num_steps, self.config.seed, iteration)
        noise = self._draw_noise(group, plan)
        steps = policy.draw_step_noise(
            noise.shape, policy.sampler, policy.num_steps, window, group=group, branch_step=plan.branch_step
        )

        def sample(rows: slice) -> Samples:
            return policy.rollout(
                cond.select(torch.arange(rows.start, rows.stop)),
                noise[rows],
                sampler=policy.sampler,
                num_steps=policy.num_steps,
                guidance_scale=training.guidance_scale,
                window=window,
                keep_states=bool(needs & {"states", "log_prob"}),
                weights="old" if "old" in needs else "current",
                group=group[rows].to(policy.device),
                branch_step=plan.branch_step,
                keep_steps=plan.keep_steps,
                step_noise=steps.select(rows),
            )

        branches = None if plan.branch_step is None else group.unique_consecutive(return_counts=True)[1].tolist()
        return kept_samples(self.sampling.map(sample, len(group), branches), len(group), policy.device)

    @torch.no_grad()
    def _decoded(self, x0: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) of latents (B, C, h, w)."""
        shelf = Shelf(len(x0), self.policy.device)
        for images in self.decoding.map(lambda rows: self.policy.decode(x0[rows]), len(x0)):
            shelf.add(images)
        return shelf.whole()

    def _let_rewards_rest(self) -> None:
        for part in self.reward.parts().values():
            part.rest()

    def _draw_noise(self, group: torch.Tensor, plan: RolloutPlan) -> torch.Tensor:
        """The first noise (B, C, h, w) of images with these groups (B,), on the host."""
        if not plan.shared_noise:
            return self.policy.draw_noise(len(group), HOST)
        first = int(group.min())  # of this process
        return self.policy.draw_noise(int(group.max()) - first + 1, HOST)[group - first]

    def _draw_prompts(self, iteration: int) -> tuple[torch.Tensor, tuple[Prompt, ...]]:
        """The group (B,) of each image of an iteration, and its prompt; all prompts before one comes twice."""
        training = self.config.training
        chosen = torch.randperm(len(self.prompts), generator=generator_for(self.config.seed, "prompts", iteration))
        count = training.prompts_per_iteration
        chosen = chosen.repeat(math.ceil(count / len(chosen)))[:count]
        group = torch.arange(count).repeat_interleave(training.images_per_prompt)
        return group, tuple(self.prompts[chosen[g]] for g in group)

    @torch.no_grad()
    def _scores(self, images: torch.Tensor, prompts: tuple[str, ...], budget: Budget) -> dict[str, torch.Tensor]:
        """Raw scores (B,) of images by each part of the reward."""
        scores = {}
        for name, part in self.reward.parts().items():
            work = partial(_score, part, images, prompts)
            scores[name] = torch.cat([*self.scoring.map(work, len(prompts))])
            budget.reward_calls += len(prompts)
        return scores


def kept_samples(parts: Iterator[Samples], n: int, device: torch.device) -> Samples:
    """The samples of n rows, from those of consecutive parts; latents are kept as a `Shelf` keeps them."""
    shelves = {name: Shelf(n, device) for name in ("x0", "states", "mean")}
    small: dict[str, list[torch.Tensor]] = {"log_prob": [], "std": []}
    kept: dict[str, Any] = {"states": None, "log_prob": None}
    for part in parts:
        kept["sigmas"] = part.sigmas
        for name, value in vars(part).items():
            if value is not None and name != "sigmas":
                shelves[name].add(value) if name in shelves else small[name].append(value)
    kept |= {name: shelf.whole() for name, shelf in shelves.items() if shelf.rows is not None}
    kept |= {name: torch.cat(values) for name, values in small.items() if values}
    return Samples(**kept)


def _score(reward: Reward, images: torch.Tensor, prompts: tuple[str, ...], rows: slice) -> torch.Tensor:
    return checked_score(reward, images[rows], prompts[rows])


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
