"""What an algorithm's methods take, give and change, noted while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from flowbench.algorithm import Algorithm
from flowbench.models.policy import EXTRA_VIEWS, Policy
from flowbench.rollout import Batch, Loss, Rollout

PROBES = 8  # rows on which weight views are compared


@dataclass(frozen=True)
class Part:
    """One part of a loss, and which parameters its gradient reaches (gradient not zero)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    finite: bool
    reaches_policy: bool
    reaches_networks: bool


@dataclass(frozen=True)
class LossCall:
    """One call of an algorithm's loss or auxiliary_loss."""

    rows: int
    policy: Part | None
    auxiliary: Part | None


@dataclass
class Observation:
    """A run seen from inside.

    stage: what is running: a method of the algorithm, or "training", the core's loop; fault: the
    stage at which it ended early, and why; moved: weight views that changed although no update was due, and frozen
    parts that changed at all; stray: parts that are not trained but have a gradient; scored: calls of the reward by the
    algorithm.
    """

    stage: str = "setup"
    fault: tuple[str, str] | None = None
    calls: list[LossCall] = field(default_factory=list)
    iterations: int = 0
    moved: set[str] = field(default_factory=set)
    stray: set[str] = field(default_factory=set)
    scored: int = 0

    @property
    def first_policy_loss(self) -> int | None:
        """The number of calls before the first with a loss of the policy; None if there is none."""
        return next((i for i, call in enumerate(self.calls) if call.policy), None)


class Watcher:
    """Wraps an algorithm's prepare, loss and score to note what they take, give and change."""

    def __init__(self, algorithm: Algorithm, policy: Policy, seen: Observation, needs: frozenset[str]) -> None:
        self.algorithm, self.policy, self.seen, self.needs = algorithm, policy, seen, needs
        self._prepare, self._loss, self._score = algorithm.prepare, algorithm.loss, algorithm.score
        self._parts = _frozen_parts(policy)
        self._before = {name: [p.detach().clone() for p in parts] for name, parts in self._parts.items()}
        self._reference = self._velocity("reference")
        algorithm.prepare = self.prepare  # type: ignore[method-assign]
        algorithm.loss = self.loss  # type: ignore[method-assign]
        self._auxiliary_loss = algorithm.auxiliary_loss
        algorithm.auxiliary_loss = self.auxiliary_loss  # type: ignore[method-assign]
        algorithm.score = self.score

    def prepare(self, rollout: Rollout) -> Batch:
        """`prepare` of a rollout that holds only what is declared."""
        self.seen.stage = "prepare"
        path = rollout.states if self.needs & {"states", "log_prob"} else None
        rollout = replace(rollout, states=path, log_prob=rollout.log_prob if "log_prob" in self.needs else None)
        batch = self._prepare(rollout)
        self.seen.stage = "training"
        return batch

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """`loss`, with its parts noted."""
        self.seen.stage = "loss"
        before = self._views()
        loss = self._loss(policy, batch)
        self.seen.moved |= {name for name, v in self._views().items() if not torch.equal(v, before[name])}
        self.seen.stage = "training"
        self.seen.calls.append(LossCall(len(batch), self._part(loss.policy), self._part(loss.auxiliary)))
        return loss

    def auxiliary_loss(self, policy: Policy, batch: Batch) -> torch.Tensor | None:
        """`auxiliary_loss`, noted."""
        self.seen.stage = "auxiliary_loss"
        loss = self._auxiliary_loss(policy, batch)
        self.seen.stage = "training"
        if loss is not None:
            self.seen.calls.append(LossCall(len(batch), None, self._part(loss)))
        return loss

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """The reward, counted."""
        self.seen.scored += 1
        return self._score(images, prompts)

    def close(self) -> None:
        """Note what is not as it was before the run."""
        if not torch.equal(self._velocity("reference"), self._reference):
            self.seen.moved.add("reference")
        trained = {id(p) for p in self.policy.trainable_parameters()}
        for name, parts in self._parts.items():
            if any(not torch.equal(p, q) for p, q in zip(parts, self._before[name], strict=True)):
                self.seen.moved.add(name)
            if any(p.grad is not None and id(p) not in trained for p in parts):
                self.seen.stray.add(name)

    def _part(self, part: torch.Tensor | None) -> Part | None:
        if part is None:
            return None
        networks = [p for network in self.algorithm.networks().values() for p in network.parameters()]
        return Part(
            shape=tuple(part.shape),
            dtype=part.dtype,
            finite=bool(part.isfinite().all()),
            reaches_policy=_reaches(part, self.policy.trainable_parameters()),
            reaches_networks=_reaches(part, networks),
        )

    def _views(self) -> dict[str, torch.Tensor]:
        return {name: self._velocity(name) for name in ("reference", *filter(self.policy.has_view, EXTRA_VIEWS))}

    @torch.no_grad()
    def _velocity(self, view: str) -> torch.Tensor:
        """A view's velocity on fixed rows."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(PROBES, *self.policy.latent_shape, generator=generator)
        cond = self.policy.encode([""] * PROBES)
        return self.policy.velocity(x, torch.linspace(0.1, 0.9, PROBES), cond, view)


def _frozen_parts(policy: Policy) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters of each of the pipeline's parts that no optimizer may touch."""
    trained = {id(p) for p in policy.trainable_parameters()}
    modules = {n: m for n, m in policy.pipeline.components.items() if isinstance(m, torch.nn.Module)}
    return {name: [p for p in module.parameters() if id(p) not in trained] for name, module in modules.items()}


def _reaches(part: torch.Tensor, parameters: list[torch.nn.Parameter]) -> bool:
    if not part.requires_grad or not parameters:
        return False
    grads = torch.autograd.grad(part.sum(), parameters, retain_graph=True, allow_unused=True)
    return any(g is not None and bool(g.any()) for g in grads)
