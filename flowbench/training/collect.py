"""The first half of an iteration: prompts are drawn, images generated and scored, in portions that fit the device.

What an iteration keeps of latents and images lies in host memory where the model is on a GPU. There the images of one
portion are decoded and scored while the next is sampled (`training.overlap`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from flowbench.algorithm import Algorithm
from flowbench.config import RunConfig, TrainingConfig
from flowbench.models.memory import Portion
from flowbench.models.policy import Policy, Samples
from flowbench.prompts import Prompt
from flowbench.reward import Reward, check_signal
from flowbench.rollout import Conditioning, Rollout, RolloutPlan
from flowbench.seeding import generator_for
from flowbench.stored import HOST, Shelf
from flowbench.training.beside import Helper, pays_on
from flowbench.training.budget import Budget
from flowbench.training.processes import joined, own_groups
from flowbench.training.scored import ScoredImages


class Collector:
    """Generates and scores the images of one iteration after another.

    overlaps: whether it scores in a second thread while it generates; it ends when memory runs out for both at once.
    """

    def __init__(
        self, config: RunConfig, policy: Policy, algorithm: Algorithm, reward: Reward, prompts: tuple[Prompt, ...]
    ) -> None:
        self.config, self.policy, self.algorithm, self.reward, self.prompts = config, policy, algorithm, reward, prompts
        self.sampling = Portion("the rollout", config.training.rollout_batch, ledger=policy.evaluations)
        self.decoding = Portion("decoding", config.training.decode_batch)
        self.scoring = Portion("scoring", config.training.decode_batch)
        own = len(own_groups(policy.processes, config.training)[0]) * config.training.images_per_prompt
        self.overlaps = pays_on(policy.device) and config.training.overlaps(own)
        self._stream = torch.cuda.Stream(policy.device) if self.overlaps and policy.device.type == "cuda" else None

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
        scored = ScoredImages(self.policy, self.reward, prompts[mine], self.decoding, self.scoring, budget)
        with self.policy.rollout_precision(), draws:
            with budget.timed("rollout", device):
                cond = self.policy.encode(prompts)
            own = cond.select(torch.arange(len(group))[mine])
            samples = self._sampled_and_scored(own, group[mine], iteration, scored, budget)
        budget.reward_calls += len(scored.prompts) * len(self.reward.parts())
        self._let_rewards_rest()
        samples, images, scores = joined(processes, samples, scored.images, scored.scores)
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

    def _sampled_and_scored(
        self, cond: Conditioning, group: torch.Tensor, iteration: int, scored: ScoredImages, budget: Budget
    ) -> Samples:
        """The rollout of images with this conditioning and these groups (B,), decoded and scored after it.

        Or, where the device has room for both, beside it: whole portions of what is sampled so far, so that no batch
        is another one. No process speaks to others meanwhile.
        """
        kept = KeptSamples(len(group), self.policy.device)
        if not self.overlaps:
            with budget.timed("rollout", self.policy.device):
                for part in self._sampled(cond, group, iteration):
                    kept.add(part)
            samples = kept.whole()
            scored.proceed(samples.x0, len(group))
            return samples
        begun, size = 0, self.config.training.decode_batch
        with Helper(self._stream) as helper:
            try:
                parts = self._sampled(cond, group, iteration, helper.main_alone)
                while kept.count < len(group):
                    with budget.timed("rollout", self.policy.device):
                        kept.add(next(parts))
                    ready = kept.count if kept.count == len(group) else kept.count // size * size
                    if ready > begun:
                        helper.start(partial(scored.proceed, kept.x0, ready, helper.piece_alone))
                        begun = ready
                helper.wait()
            finally:
                scored.given_up = True
                self.overlaps = self.overlaps and not helper.taking_turns
        return kept.whole()

    def _sampled(
        self, cond: Conditioning, group: torch.Tensor, iteration: int, alone: Callable[[], bool] | None = None
    ) -> Iterator[Samples]:
        """The rollout of images with this conditioning and these groups (B,), portion by portion.

        All of its noise is drawn first, so that it does not depend on the portions. alone: as in `Portion.map`.
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
        return self.sampling.map(sample, len(group), branches, alone=alone)

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


class KeptSamples:
    """The samples of n rows, which come in consecutive parts; latents are kept as a `Shelf` keeps them."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.count = 0
        self._shelves = {name: Shelf(n, device) for name in ("x0", "states", "mean")}
        self._small: dict[str, list[torch.Tensor]] = {"log_prob": [], "std": []}
        self._sigmas: torch.Tensor | None = None

    @property
    def x0(self) -> torch.Tensor:
        """The latents (n, C, h, w), of which `count` rows have come, at least one."""
        return self._shelves["x0"].whole()

    def add(self, part: Samples) -> None:
        """Keep the next rows."""
        self._sigmas = part.sigmas
        for name, value in vars(part).items():
            if value is not None and name != "sigmas":
                self._shelves[name].add(value) if name in self._shelves else self._small[name].append(value)
        self.count += len(part.x0)

    def whole(self) -> Samples:
        """The samples of all rows."""
        kept: dict[str, Any] = {"sigmas": self._sigmas, "states": None, "log_prob": None}
        kept |= {name: shelf.whole() for name, shelf in self._shelves.items() if shelf.rows is not None}
        kept |= {name: torch.cat(values) for name, values in self._small.items() if values}
        return Samples(**kept)


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
