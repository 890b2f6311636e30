"""The update directions of an algorithm's batches, all taken from the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from flowbench.errors import RunError
from flowbench.rollout import Batch, Rollout
from flowbench.seeding import generator_for
from flowbench.training.budget import Budget
from flowbench.training.trainer import Trainer


@dataclass(frozen=True)
class Updates:
    """Update directions (D,) of batches of `images` images, and those of the same batches under shuffled rewards."""

    plain: tuple[torch.Tensor, ...]
    shuffled: tuple[torch.Tensor, ...] | None
    images: int
    warmup_iterations: int
    warmup_images: int


def measure_updates(
    trainer: Trainer,
    batches: int,
    warmup: int = 0,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Updates:
    """The updates of `batches` iterations, each from the weights that the policy has now.

    First come `warmup` iterations on the side, or as many as the algorithm itself leaves the policy out of: its own
    networks learn, the policy stays. After them nothing learns. Raises RunError where the warm-up has no end.
    """
    algorithm, reward, name = trainer.algorithm, trainer.reward, trainer.config.algorithm
    plain: list[torch.Tensor] = []
    shuffled: list[torch.Tensor] = []
    images = first = warmup_images = 0
    rewards_reach_it = "reward_grad" not in algorithm.info.needs  # else the loss itself computes them
    for group in trainer.updater.optimizer.param_groups:
        group["lr"] = 0.0
    iteration = 0
    while len(plain) < batches:
        state = copy.deepcopy((algorithm.state_dict(), reward.state_dict()))
        rollout = trainer.collector.collect(iteration, Budget())
        randomness = trainer.policy.generator.get_state()
        batch = algorithm.prepare(rollout)
        update = update_direction(trainer, batch, iteration) if iteration >= warmup else None
        if update is None:
            _learn_on_the_side(trainer, batch, iteration, warmup)
            iteration, first, warmup_images = iteration + 1, iteration + 1, warmup_images + len(rollout)
            continue
        plain.append(update)
        _restore(trainer, state)
        if rewards_reach_it:
            trainer.policy.generator.set_state(randomness)
            order = generator_for(trainer.config.seed, "probe-shuffle", iteration)
            batch = algorithm.prepare(shuffle_rewards(rollout, order))
            other = update_direction(trainer, batch, iteration)
            assert other is not None
            shuffled.append(other)
            _restore(trainer, state)
        iteration, images = iteration + 1, len(rollout)
        progress(name, len(plain), batches)
    return Updates(tuple(plain), tuple(shuffled) if rewards_reach_it else None, images, first, warmup_images)


def _learn_on_the_side(trainer: Trainer, batch: Batch, iteration: int, warmup: int) -> None:
    if iteration >= max(warmup, trainer.iterations):
        raise RunError(
            f"{trainer.config.algorithm} leaves the policy out of all {trainer.iterations} iterations of its budget; "
            "shorten its warm-up or raise training.images"
        )
    trainer.updater.update(batch, iteration)
    trainer.algorithm.after_iteration(trainer.policy)


def _restore(trainer: Trainer, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    algorithm, reward = copy.deepcopy(state)
    trainer.algorithm.load_state_dict(algorithm)
    trainer.reward.load_state_dict(reward)


def update_direction(trainer: Trainer, batch: Batch, iteration: int) -> torch.Tensor | None:
    """The negative gradient (D,) float32, on the CPU, that an iteration hands the optimizer, before it is clipped.

    Summed over its minibatches, all from the same weights. None if the loss leaves the policy out.
    """
    updater = trainer.updater
    microbatch, counts = trainer.config.training.microbatch, False
    for rows in updater.minibatches(batch, iteration):
        counts |= updater.gradient(updater.drawn(rows), microbatch)[1]
    updater.finite.check()
    slopes = [(torch.zeros_like(p) if p.grad is None else p.grad).detach() for p in updater.parameters]
    direction = -torch.cat([slope.flatten().float().cpu() for slope in slopes])
    for p in (*updater.parameters, *updater.auxiliary_parameters):
        p.grad = None
    if counts and not direction.isfinite().all():
        raise RunError(f"the gradient of '{trainer.config.algorithm}' is not finite; check the rewards' scale")
    return direction if counts else None


def shuffle_rewards(rollout: Rollout, generator: torch.Generator) -> Rollout:
    """The rollout with its rewards in random order within each prompt; every order is equally likely."""
    group = rollout.group.cpu()
    places = group.argsort(stable=True)
    drawn_first = torch.rand(len(group), generator=generator).argsort()
    givers = drawn_first[group[drawn_first].argsort(stable=True)]
    order = torch.empty_like(places)
    order[places] = givers
    order = order.to(rollout.reward.device)
    components = {name: values[order] for name, values in rollout.components.items()}
    return replace(rollout, reward=rollout.reward[order], components=components)
