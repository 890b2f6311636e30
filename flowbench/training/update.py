"""The second half of an iteration: passes over its rows, one optimizer step per minibatch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from flowbench.algorithm import Algorithm
from flowbench.config import RunConfig
from flowbench.errors import RunError
from flowbench.models.memory import Portion
from flowbench.models.policy import ANCHOR, Policy
from flowbench.rollout import Batch, Loss
from flowbench.seeding import generator_for
from flowbench.training.average import WeightAverage
from flowbench.training.metrics import Finite, Metrics
from flowbench.training.optimizer import adamw, step
from flowbench.training.processes import joined_means, own_rows, told_means
from flowbench.training.rows import UPDATE, Cut, compared, drawn, shuffled


class Updater:
    """Trains the policy, and the algorithm's own networks, on batches of rows.

    average: the running average of the trained weights; updates: optimizer steps of the policy so far.
    """

    def __init__(self, config: RunConfig, policy: Policy, algorithm: Algorithm) -> None:
        self.config, self.policy, self.algorithm = config, policy, algorithm
        training = config.training
        self.parameters = policy.trainable_parameters()
        self.auxiliary_parameters = [p for network in algorithm.networks().values() for p in network.parameters()]
        self.optimizer = adamw(self.parameters, training.learning_rate, training.adam_betas, training.weight_decay)
        self.auxiliary_optimizer = (
            adamw(self.auxiliary_parameters, training.auxiliary_learning_rate) if self.auxiliary_parameters else None
        )
        self.average = WeightAverage(self.parameters, training.ema)
        if training.anchor_decay is not None:
            policy.add_view(ANCHOR)
        self._iteration, self.updates = 0, 0
        self.portion = Portion(UPDATE, training.microbatch, "rows", policy.evaluations)
        self.finite = Finite()

    def update(self, batch: Batch, iteration: int) -> dict[str, float]:
        """Pass over the rows of iteration `iteration` in random minibatches; returns the means of the metrics.

        Raises RunError when the loss or its gradient is not finite.
        """
        metrics = Metrics()
        self._iteration = iteration
        for rows in self.minibatches(batch, iteration):
            for name, value in self._step(rows).items():
                metrics.add(name, value)
        if self.config.training.anchor_decay is not None:
            self.policy.update_view(ANCHOR, self.config.training.anchor_decay)
        self.finite.check()
        return metrics.fetched()

    def minibatches(self, batch: Batch, iteration: int) -> Iterator[Batch]:
        """The minibatches of iteration `iteration` in turn, with the policy's generator set for their draws."""
        training = self.config.training
        self.policy.generator = generator_for(self.config.seed, "loss", iteration)
        order = generator_for(self.config.seed, "minibatches", iteration)
        for _ in range(training.epochs):
            for rows in Cut(training.minibatch, self.algorithm.whole_groups).parts(batch, shuffled(batch, order)):
                yield batch.select(rows)

    def gradient(self, batch: Batch, microbatch: int | None) -> tuple[dict[str, torch.Tensor], bool]:
        """Add the gradient of a minibatch's mean loss to the parameters; its rows have what `drawn` gives them.

        Returns the metrics' means, and whether the policy has a loss. The gradient is the same whatever the microbatch.
        Of several processes each differentiates rows of its own, and all have the sum; no gradient may be there before.
        Whether all of it is finite, `finite.check` says.
        """
        own = self._own(batch)
        portion = self.portion
        if microbatch != self.config.training.microbatch:
            portion = Portion(UPDATE, microbatch, "rows", self.policy.evaluations)
        cut = Cut(portion.size or len(batch), self.algorithm.whole_groups)
        processes = self.policy.processes
        with self.policy.anchored():
            batch, comparison = compared(self.algorithm, self.policy, batch, cut, portion, own, processes)
            metrics, updates_policy = self._accumulate(batch, own, portion, self.algorithm.loss)
        parameters = [*self.parameters, *self.auxiliary_parameters]
        told = processes.add_gradients(parameters, (told_means(processes, metrics.parts), updates_policy))
        metrics.parts = joined_means([parts for parts, _ in told])
        for name, value in comparison.metrics.items():
            metrics.add(name, value)
        return metrics.means(), any(updates for _, updates in told)

    def _accumulate(
        self, batch: Batch, rows: torch.Tensor, portion: Portion, loss_of: Callable[[Policy, Batch], Loss | None]
    ) -> tuple[Metrics, bool]:
        """Add these rows' part of the gradient of a minibatch's mean loss, in microbatches.

        Returns what they log, and whether one has a loss of the policy.

        When memory runs out, what was added is taken back and all of it is done again in smaller microbatches: a
        backward pass that fails half-way has already added to some gradients.
        """
        whole = self.algorithm.whole_groups
        parameters = [*self.parameters, *self.auxiliary_parameters]
        before = [None if p.grad is None else p.grad.clone() for p in parameters]

        def undo() -> None:
            for p, gradient in zip(parameters, before, strict=True):
                p.grad = None if gradient is None else gradient.clone()

        def work(size: int) -> tuple[Metrics, bool]:
            metrics, updates_policy = Metrics(), False
            for part in Cut(size, whole).parts(batch, rows):
                loss = loss_of(self.policy, batch.select(part).fetched())
                if loss is not None:
                    (self._total(loss) * (len(part) / len(batch))).backward()
                    updates_policy |= loss.policy is not None
                    for name, values in loss.metrics.items():
                        metrics.add(name, values)
            return metrics, updates_policy

        longest = max(Cut(1, whole).groups(batch, rows) or (1,))
        return portion.whole(work, len(rows), longest, undo)

    def _step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One optimizer step on one minibatch, accumulated over microbatches."""
        metrics, updates_policy = self.gradient(self.drawn(batch), self.config.training.microbatch)
        if updates_policy:
            metrics["grad_norm"] = self._clip(self.parameters)
            step(self.optimizer, metrics["grad_norm"], self.finite)
        self.optimizer.zero_grad(set_to_none=True)
        if self.auxiliary_optimizer:
            self._auxiliary_step(self.auxiliary_optimizer)
            for _ in range(self.config.training.auxiliary_steps - 1):
                self._extra_auxiliary_step(batch, self.auxiliary_optimizer)
        if updates_policy:
            self.updates += 1
            self.algorithm.after_update(self.policy)
            self.average.step()
        return metrics

    def drawn(self, batch: Batch) -> Batch:
        """The rows with the noise and sigmas that a step hands them."""
        return drawn(self.algorithm, self.policy, batch, self.config.training.shared_noise)

    def _own(self, batch: Batch) -> torch.Tensor:
        """The rows of a minibatch that are this process's."""
        return own_rows(self.policy.processes, batch, self.algorithm.whole_groups)

    def _auxiliary_step(self, optimizer: torch.optim.AdamW) -> None:
        step(optimizer, self._clip(self.auxiliary_parameters), self.finite)
        optimizer.zero_grad(set_to_none=True)

    def _extra_auxiliary_step(self, batch: Batch, optimizer: torch.optim.AdamW) -> None:
        """One more step of the algorithm's own networks, on fresh noise."""
        learns = False

        def loss_of(policy: Policy, rows: Batch) -> Loss | None:
            nonlocal learns
            loss = self.algorithm.auxiliary_loss(policy, rows)
            learns |= loss is not None
            return None if loss is None else Loss(None, loss)

        batch = self.drawn(batch)
        self._accumulate(batch, self._own(batch), self.portion, loss_of)
        if any(self.policy.processes.add_gradients(self.auxiliary_parameters, learns)):
            self._auxiliary_step(optimizer)

    def _total(self, loss: Loss) -> torch.Tensor:
        name, parts = self.algorithm.info.name, [part for part in (loss.policy, loss.auxiliary) if part is not None]
        if not parts:
            raise RunError(f"the loss of '{name}' has neither a policy nor an auxiliary part")
        if any(part.ndim != 1 for part in parts):
            raise RunError(f"the loss of '{name}' has shape {tuple(parts[0].shape)}; it must be one value per row")
        total = torch.stack([part.mean() for part in parts]).sum()
        fault = f"the loss of '{name}' is {{}}; lower training.learning_rate or check the rewards' scale"
        self.finite.watch(fault, total)
        return total

    def _clip(self, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.training.max_grad_norm)
        where = f"in iteration {self._iteration + 1}; lower training.learning_rate"
        self.finite.watch(f"the gradient of '{self.algorithm.info.name}' is {{}} {where}", norm)
        return norm

    def use_average(self) -> None:
        """Put the averaged weights, if the run keeps them, in place of the current ones, for evaluation."""
        self.average.use()
