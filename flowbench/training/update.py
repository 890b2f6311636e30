"""The second half of an iteration: passes over its rows, one optimizer step per minibatch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flowbench.algorithm import Algorithm
from flowbench.config import RunConfig
from flowbench.errors import RunError
from flowbench.models.policy import ANCHOR, Policy
from flowbench.rollout import Batch, Loss
from flowbench.seeding import generator_for
from flowbench.training.average import WeightAverage
from flowbench.training.metrics import Finite, Metrics
from flowbench.training.optimizer import adamw, step
from flowbench.training.rows import Cut, compared, drawn, shuffled


class Updater:
    """Trains the policy, and the algorithm's own networks, on batches of rows.

    average: the running average of the trained weights.
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
        self._iteration = 0
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
        Whether all of it is finite, `finite.check` says.
        """
        cut, metrics, updates_policy = Cut(microbatch or len(batch), self.algorithm.whole_groups), Metrics(), False
        with self.policy.anchored():
            batch, comparison = compared(self.algorithm, self.policy, batch, cut)
            for rows in cut.parts(batch):
                loss = self.algorithm.loss(self.policy, batch.select(rows))
                (self._total(loss) * (len(rows) / len(batch))).backward()
                updates_policy |= loss.policy is not None
                for name, values in loss.metrics.items():
                    metrics.add(name, values)
        for name, value in comparison.metrics.items():
            metrics.add(name, value)
        return metrics.means(), updates_policy

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
            self.algorithm.after_update(self.policy)
            self.average.step()
        return metrics

    def drawn(self, batch: Batch) -> Batch:
        """The rows with the noise and sigmas that a step hands them."""
        return drawn(self.algorithm, self.policy, batch, self.config.training.shared_noise)

    def _auxiliary_step(self, optimizer: torch.optim.AdamW) -> None:
        step(optimizer, self._clip(self.auxiliary_parameters), self.finite)
        optimizer.zero_grad(set_to_none=True)

    def _extra_auxiliary_step(self, batch: Batch, optimizer: torch.optim.AdamW) -> None:
        """One more step of the algorithm's own networks, on fresh noise."""
        batch, learns = self.drawn(batch), False
        cut = Cut(self.config.training.microbatch or len(batch), self.algorithm.whole_groups)
        for rows in cut.parts(batch):
            loss = self.algorithm.auxiliary_loss(self.policy, batch.select(rows))
            if loss is not None:
                (self._total(Loss(None, loss)) * (len(rows) / len(batch))).backward()
                learns = True
        if learns:
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
