"""The one loop: rollout, score, prepare, update; with its budget, checkpoints and log."""

from __future__ import annotations

import copy
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import torch

from flowbench.algorithm import Algorithm, RewardFunction
from flowbench.config import RunConfig, TrainingConfig
from flowbench.errors import RunError, RunInterruptedError
from flowbench.models.policy import Policy
from flowbench.prompts import Prompt
from flowbench.reward import Reward, check_signal, checked_score
from flowbench.rollout import Batch, Loss, Rollout
from flowbench.scoring.combination import WeightedSum
from flowbench.seeding import generator_for
from flowbench.terms import path_name
from flowbench.training.state import load_state, save_state

CHECKPOINT = "checkpoints/last.safetensors"
METRICS = "metrics.jsonl"


@dataclass
class Budget:
    """What a run spent. seconds is wall time of training; the parts in `timings` are shares of it."""

    images: int = 0
    reward_calls: int = 0
    function_evaluations: int = 0
    seconds: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)


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
    of an iteration.
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
        self.prompts, self.folder, self.on_iteration = prompts, folder, on_iteration
        self.probe: Callable[[int], dict[str, float]] = lambda iteration: {}
        self.observe: Callable[[Rollout], dict[str, float]] = lambda rollout: {}
        self.budget, self.iteration = Budget(), 0
        training = config.training
        self.images_per_iteration = training.prompts_per_iteration * training.images_per_prompt
        self.iterations = math.ceil(training.images / self.images_per_iteration)
        algorithm.setup(policy)
        algorithm.score = self._counted(algorithm.score)
        for network in algorithm.networks().values():
            network.to(policy.device)
        self.parameters = policy.trainable_parameters()
        self.auxiliary_parameters = [p for network in algorithm.networks().values() for p in network.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=training.learning_rate,
            betas=training.adam_betas,
            weight_decay=training.weight_decay,
        )
        self.auxiliary_optimizer = (
            torch.optim.AdamW(self.auxiliary_parameters, lr=training.auxiliary_learning_rate)
            if self.auxiliary_parameters
            else None
        )
        self.average = [p.detach().clone() for p in self.parameters] if training.ema else []
        self._stop = False

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> Budget:
        """Train from where the trainer stands to the end of the budget.

        Raises RunError for a bad reward or loss (after saving all that was computed), RunInterruptedError on Ctrl-C.
        """
        self._encode_prompts()
        with self._catch_interrupt():
            while self.iteration < self.iterations:
                self._iterate()
                if self._stop:
                    self.save()
                    raise RunInterruptedError(
                        f"interrupted after iteration {self.iteration} of {self.iterations}, all of it saved; "
                        "the same command with --resume continues"
                    )
        self.save()
        return self.budget

    def _iterate(self) -> None:
        begun = time.perf_counter()
        budget = copy.deepcopy(self.budget)
        try:
            rollout = self._collect()
        except RunError:
            self.budget = budget  # the iteration begins anew when the run is resumed
            self.save()  # nothing was updated since the last iteration
            raise
        batch = self.algorithm.prepare(rollout)
        metrics = self._update(batch)
        self.algorithm.after_iteration(self.policy)
        self.iteration += 1
        with self._timed("probe"):
            metrics |= self.probe(self.iteration) | self.observe(rollout)
        self.budget.images += len(rollout)
        self.budget.function_evaluations = self.policy.function_evaluations
        seconds = time.perf_counter() - begun
        self.budget.seconds += seconds
        log = IterationLog(
            iteration=self.iteration,
            images=self.budget.images,
            reward=rollout.reward.mean().item(),
            reward_std=rollout.reward.std().item() if len(rollout) > 1 else 0.0,
            metrics={**metrics, **self._part_means(rollout)},
            seconds=seconds,
        )
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(log)) + "\n")
        if self.iteration % self.config.training.checkpoint_every == 0:
            self.save()
        self.on_iteration(log)

    def _collect(self) -> Rollout:
        """Generate and score the images of one iteration."""
        training, seed, k = self.config.training, self.config.seed, self.iteration
        needs = self.algorithm.needs()
        chosen = torch.randperm(len(self.prompts), generator=generator_for(seed, "prompts", k))
        chosen = chosen.repeat(math.ceil(training.prompts_per_iteration / len(chosen)))[
            : training.prompts_per_iteration
        ]
        group = torch.arange(len(chosen)).repeat_interleave(training.images_per_prompt)
        prompts = tuple(self.prompts[chosen[g]] for g in group)
        self.policy.generator = generator_for(seed, "rollout", k)
        with self._timed("rollout"):
            cond = self.policy.encode(prompts)
            samples = self.policy.rollout(
                cond,
                self.policy.draw_noise(len(prompts)),
                sampler=self.policy.sampler,
                num_steps=self.policy.num_steps,
                guidance_scale=training.guidance_scale,
                window=stochastic_steps(training, self.policy.num_steps, seed, k),
                keep_states=bool(needs & {"states", "log_prob"}),
                weights="old" if "old" in needs else "current",
            )
        images = torch.cat([self._decode(part) for part in samples.x0.split(training.decode_batch)])
        scores = self._scores(images, prompts)
        self.reward.observe(scores)
        return Rollout(
            iteration=k,
            prompts=prompts,
            group=group.to(self.policy.device),
            cond=cond,
            sigmas=samples.sigmas,
            x0=samples.x0,
            images=images,
            reward=self.reward.combine(scores),
            components=scores,
            states=samples.states,
            log_prob=samples.log_prob,
        )

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        with self._timed("decode"):
            return self.policy.decode(latents)

    def _part_means(self, rollout: Rollout) -> dict[str, float]:
        """The mean raw score of each reward in a sum; a plain reward has its own field in the log."""
        if not isinstance(self.reward, WeightedSum):
            return {}
        return {f"reward_{path_name(name)}": scores.mean().item() for name, scores in rollout.components.items()}

    @torch.no_grad()
    def _scores(self, images: torch.Tensor, prompts: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Raw scores (B,) of all images by each part of the reward.

        Raises RunError for a score that is not finite, or scores that say nothing.
        """
        size, scores = self.config.training.decode_batch, {}
        with self._timed("reward"):
            for name, part in self.reward.parts().items():
                batches = zip(images.split(size), _split(prompts, size), strict=True)
                scores[name] = torch.cat([checked_score(part, x, texts) for x, texts in batches])
                check_signal(part.info, scores[name], self.iteration + 1)
                self.budget.reward_calls += len(prompts)
        return scores

    def _update(self, batch: Batch) -> dict[str, float]:
        """Pass over the batch's rows in random minibatches; returns the means of the metrics."""
        training, sums, counts = self.config.training, dict[str, float](), dict[str, int]()
        self.policy.generator = generator_for(self.config.seed, "loss", self.iteration)
        order = generator_for(self.config.seed, "minibatches", self.iteration)
        with self._timed("update"):
            for _ in range(training.epochs):
                for rows in _shuffled(batch, order).split(training.minibatch):
                    for name, value in self._step(batch.select(rows.to(self.policy.device))).items():
                        sums[name] = sums.get(name, 0.0) + value
                        counts[name] = counts.get(name, 0) + 1
        return {name: total / counts[name] for name, total in sums.items()}

    def _step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on one minibatch, accumulated over microbatches.

        Raises RunError when the loss or its gradient is not finite.
        """
        size = self.config.training.microbatch or len(batch)
        metrics: dict[str, float] = {}
        updates_policy = False
        for rows in torch.arange(len(batch), device=self.policy.device).split(size):
            loss = self.algorithm.loss(self.policy, batch.select(rows))
            share = len(rows) / len(batch)
            total = _total(loss, self.algorithm.info.name)
            (total * share).backward()
            updates_policy |= loss.policy is not None
            for name, value in loss.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + torch.as_tensor(value).item() * share
        if updates_policy:
            metrics["grad_norm"] = self._clip(self.parameters)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.auxiliary_optimizer:
            self._auxiliary_step(self.auxiliary_optimizer)
            for _ in range(self.config.training.auxiliary_steps - 1):
                self._extra_auxiliary_step(batch, self.auxiliary_optimizer)
        if updates_policy:
            self.algorithm.after_update(self.policy)
            if self.average:
                torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - self.config.training.ema)
        return metrics

    def _auxiliary_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._clip(self.auxiliary_parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _extra_auxiliary_step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
        """One more step of the algorithm's own networks, on fresh noise."""
        loss = self.algorithm.auxiliary_loss(self.policy, batch)
        if loss is not None:
            _total(Loss(None, loss), self.algorithm.info.name).backward()
            self._auxiliary_step(optimizer)

    def _counted(self, score: RewardFunction) -> RewardFunction:
        """The reward for the algorithm's own use in its loss, on the budget."""

        def counted(images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
            self.budget.reward_calls += len(prompts)
            return score(images, prompts)

        return counted

    def _clip(self, parameters: list[torch.nn.Parameter]) -> float:
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.training.max_grad_norm)
        if not norm.isfinite():
            raise RunError(
                f"the gradient of '{self.algorithm.info.name}' is {norm.item()} in iteration {self.iteration + 1}; "
                "lower training.learning_rate"
            )
        return norm.item()

    def use_average(self) -> None:
        """Put the averaged weights, if the run keeps them, in place of the current ones, for evaluation."""
        for p, a in zip(self.parameters, self.average, strict=False):
            p.data.copy_(a)

    def _encode_prompts(self) -> None:
        self.policy.encode([""])  # on its own, as an evaluation does, so that it is the same to the last bit
        self.policy.encode(self.prompts)
        if self.policy.device.type != "cpu":
            self.policy.release_text_encoders()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write everything that resuming needs; the previous checkpoint stays until the new one is complete."""
        optimizers = [self.optimizer.state_dict()]
        if self.auxiliary_optimizer:
            optimizers.append(self.auxiliary_optimizer.state_dict())
        state = {
            "config_hash": self.config.hash(),
            "iteration": self.iteration,
            "budget": asdict(self.budget),
            "policy": self.policy.state_dict(),
            "average": self.average,
            "optimizers": optimizers,
            "networks": {name: n.state_dict() for name, n in self.algorithm.networks().items()},
            "algorithm": self.algorithm.state_dict(),
            "reward": self.reward.state_dict(),
        }
        save_state(self.folder / CHECKPOINT, state)

    def resume(self) -> bool:
        """Continue from the folder's checkpoint, if it has one; log lines after it are dropped."""
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return False
        state = load_state(path)
        self.iteration, self.budget = state["iteration"], Budget(**state["budget"])
        self.policy.load_state_dict(state["policy"])
        self.policy.function_evaluations = self.budget.function_evaluations
        self.average = [a.to(self.policy.device) for a in state["average"]]
        self.optimizer.load_state_dict(state["optimizers"][0])
        if self.auxiliary_optimizer:
            self.auxiliary_optimizer.load_state_dict(state["optimizers"][1])
        for name, network in self.algorithm.networks().items():
            network.load_state_dict(state["networks"][name])
        self.algorithm.load_state_dict(state["algorithm"])
        self.reward.load_state_dict(state.get("reward", {}))
        log = self.folder / METRICS
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
        log.write_text("".join(lines[: self.iteration]), encoding="utf-8")
        return True

    # --- timing and interruption ----------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            if self.policy.device.type == "cuda":
                torch.cuda.synchronize()
            self.budget.timings[part] = self.budget.timings.get(part, 0.0) + time.perf_counter() - begun

    @contextmanager
    def _catch_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C ends the run after the current iteration, the second one at once."""

        def request_stop(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        try:
            previous = signal.signal(signal.SIGINT, request_stop)
        except ValueError:  # not in the main thread: signals stay as they are
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


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


def _shuffled(batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """The batch's rows in random order; rows of one group stay next to each other."""
    rows = torch.randperm(len(batch), generator=generator)
    if batch.group is None:
        return rows
    groups = batch.group.cpu()[rows]
    rank = torch.randperm(int(groups.max()) + 1, generator=generator)
    return rows[rank[groups].argsort(stable=True)]


def _total(loss: Loss, name: str) -> torch.Tensor:
    parts = [part for part in (loss.policy, loss.auxiliary) if part is not None]
    if not parts:
        raise RunError(f"the loss of '{name}' has neither a policy nor an auxiliary part")
    if any(part.ndim != 1 for part in parts):
        raise RunError(f"the loss of '{name}' has shape {tuple(parts[0].shape)}; it must be one value per row")
    total = torch.stack([part.mean() for part in parts]).sum()
    if not total.isfinite():
        raise RunError(
            f"the loss of '{name}' is {total.item()}; lower training.learning_rate or check the rewards' scale"
        )
    return total


def _split(prompts: tuple[str, ...], size: int) -> Iterator[tuple[str, ...]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]
