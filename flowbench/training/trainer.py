"""The one loop: collect, prepare, update; until the budget is spent."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flowbench.algorithm import Algorithm, RewardFunction
from flowbench.config import RunConfig
from flowbench.errors import RunInterruptedError
from flowbench.files import append_line
from flowbench.models.counting import BACKWARD, FORWARD
from flowbench.models.flow import get_sampler
from flowbench.models.policy import Policy
from flowbench.names import path_name
from flowbench.prompts import Prompt
from flowbench.reward import Reward
from flowbench.rollout import Rollout
from flowbench.scoring.combination import WeightedSum
from flowbench.training.budget import Budget
from flowbench.training.checkpoint import AGAIN, METRICS, Checkpoints, rescued
from flowbench.training.collect import Collector
from flowbench.training.interrupt import StopRequest
from flowbench.training.points import Points
from flowbench.training.processes import check_division, check_equal
from flowbench.training.update import Updater

PURPOSES = (*FORWARD, BACKWARD)


@dataclass(frozen=True)
class IterationLog:
    """One line of metrics.jsonl. Everything but `seconds` is reproducible."""

    iteration: int
    images: int
    reward: float
    reward_std: float
    metrics: dict[str, float]
    seconds: float


class Trainer:
    """Trains a policy with an algorithm on a reward until the budget of images is spent.

    Further metrics for the log may be set: `probe` of the policy after an iteration (from 1), `observe` of the images
    of an iteration; and `points`, at which the averaged policy is scored on the way, outside the budget; and `again`,
    what a user is told to do to go on. Of several
    processes (`policy.processes`) each has a trainer; main alone writes, probes and observes, and `on_iteration` of
    each is called.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        algorithm: Algorithm,
        reward: Reward,
        prompts: tuple[Prompt, ...],
        folder: Path,
        on_iteration: Callable[[IterationLog], None] = lambda log: None,
    ) -> None:
        self.config, self.policy, self.algorithm, self.reward = config, policy, algorithm, reward
        self.processes = policy.processes
        check_division(self.processes, config.training)
        self.prompts, self.folder, self.on_iteration = prompts, folder, on_iteration
        self.probe: Callable[[int], dict[str, float]] = lambda iteration: {}
        self.observe: Callable[[Rollout], dict[str, float]] = lambda rollout: {}
        self.points: Points | None = None
        self.again = AGAIN
        self.budget, self.iteration = Budget(), 0
        self.iterations, self.config_hash = config.training.iterations, config.hash()
        algorithm.setup(policy)
        algorithm.score = self._counted(algorithm.score)
        for network in algorithm.networks().values():
            network.to(policy.device)
        if sampler := algorithm.plan().sampler:
            policy.sampler = get_sampler(sampler)
        self.stop = StopRequest()
        self.collector = Collector(config, policy, algorithm, reward, prompts)
        self.updater = Updater(config, policy, algorithm)
        self.checkpoints = Checkpoints(self)

    def run(self) -> Budget:
        """Train from where the trainer stands to the end of the budget.

        Raises RunError for a bad reward or loss, RunInterruptedError on Ctrl-C, SIGTERM or SIGHUP. Whatever is raised,
        the last good iteration is saved, and a note of the error says where.
        """
        self._encode_prompts()
        with self.stop.listening(), rescued(self):
            self.save()  # also before the first iteration: whatever happens, there is something to go on from
            self._measure(0)
            self._measure(self.iteration)  # which an interrupted run may have left out
            while self.iteration < self.iterations:
                self._iterate()
                self._stop_if_asked()
                self._measure(self.iteration)
        self.save()
        return self.budget

    def _stop_if_asked(self) -> None:
        if self.processes.any(self.stop.made):
            self.save()
            raise RunInterruptedError(
                f"interrupted after iteration {self.iteration} of {self.iterations}", self.stop.signal
            )

    def _measure(self, iteration: int) -> None:
        """Score the averaged policy, or for iteration 0 the base model, if that is a point that is due."""
        if self.points is None or not self.points.due(iteration):
            return
        with self.updater.average.in_use():
            self.points.measure(iteration, self.budget)
        if self.iteration:
            self._stop_if_asked()

    def _iterate(self) -> None:
        begun, spent = time.perf_counter(), copy.deepcopy(self.budget)
        with self.checkpoints.iteration(spent):
            rollout = self.collector.collect(self.iteration, self.budget)
            self.checkpoints.changing = True
            metrics = self._update(rollout, spent)
            seconds = time.perf_counter() - begun
            self.budget.seconds += seconds
            log = self._log(rollout, metrics, seconds)
        if self.iteration % self.config.training.checkpoint_every == 0:
            self.save()
        self.on_iteration(log)

    def _update(self, rollout: Rollout, spent: Budget) -> dict[str, float]:
        """Prepare and update, and all that ends an iteration; spent: the budget before it."""
        with self.budget.timed("prepare", self.policy.device):
            batch = self.algorithm.prepare(rollout)
        with self.budget.timed("update", self.policy.device):
            metrics = self.updater.update(batch, self.iteration)
        self.algorithm.after_iteration(self.policy)
        self.iteration += 1
        with self.budget.timed("probe", self.policy.device):
            if self.processes.is_main:
                metrics |= self.probe(self.iteration) | self.observe(rollout)
        self._count(spent, len(rollout))
        check_equal(self.processes, [*self.updater.parameters, *self.updater.auxiliary_parameters], self.iteration)
        return metrics

    def _count(self, before: Budget, images: int) -> None:
        """Set what all processes together have spent, from what it was before an iteration of so many images."""
        now, then = self.policy.evaluations.counts, before.evaluations
        spent = [now.get(purpose, 0) - then.get(purpose, 0) for purpose in PURPOSES]
        calls, *spent = self.processes.total((self.budget.reward_calls - before.reward_calls, *spent))
        self.budget.images += images
        self.budget.reward_calls = before.reward_calls + calls
        self.budget.updates = self.updater.updates
        totals = {purpose: then.get(purpose, 0) + n for purpose, n in zip(PURPOSES, spent, strict=True)}
        self.budget.evaluations = {purpose: n for purpose, n in totals.items() if n}
        self.policy.evaluations.counts = dict(self.budget.evaluations)

    def _log(self, rollout: Rollout, metrics: dict[str, float], seconds: float) -> IterationLog:
        log = IterationLog(
            iteration=self.iteration,
            images=self.budget.images,
            reward=rollout.reward.mean().item(),
            reward_std=rollout.reward.std().item() if len(rollout) > 1 else 0.0,
            metrics={**metrics, **self._part_means(rollout)},
            seconds=seconds,
        )
        if self.processes.is_main:
            append_line(self.folder / METRICS, json.dumps(asdict(log)))
        return log

    def _part_means(self, rollout: Rollout) -> dict[str, float]:
        """The mean raw score of each reward in a sum; a plain reward has its own field in the log."""
        if not isinstance(self.reward, WeightedSum):
            return {}
        return {f"reward_{path_name(name)}": scores.mean().item() for name, scores in rollout.components.items()}

    def _counted(self, score: RewardFunction) -> RewardFunction:
        """The reward for the algorithm's own use, on the budget."""

        def counted(images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
            self.budget.reward_calls += len(prompts)
            return score(images, prompts)

        return counted

    def _encode_prompts(self) -> None:
        self.policy.encode([""])  # on its own, as an evaluation does, so that it is the same to the last bit
        self.policy.encode(self.prompts)
        if self.policy.device.type != "cpu":
            self.policy.release_text_encoders()

    def save(self) -> None:
        """Write everything that going on needs; the previous checkpoint stays until the new one is complete."""
        self.checkpoints.write()

    def resume(self) -> bool:
        """Go on from the folder's newest checkpoint that is whole; log and points after it are dropped.

        False where there is none: the run begins, and log and points are empty. Raises UsageError for a checkpoint of
        another run, RunError when all are damaged.
        """
        found = self.checkpoints.restore()
        if self.points is not None:
            self.points.resume(self.iteration)
        return found
