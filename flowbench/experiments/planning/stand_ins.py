"""What a reward, a policy and rows are replaced by where tensors have no content."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from flowbench.algorithm import Batch
from flowbench.experiments.planning.storages import META
from flowbench.models.policy import Policy
from flowbench.reward import Reward
from flowbench.rollout import Conditioning
from flowbench.scoring.combination import WeightedSum


class Scorer:
    """A reward on meta images, which have no pixels that PIL could read."""

    def __init__(self, reward: Reward, half: bool = False) -> None:
        self.parts = list(reward.parts().values()) if isinstance(reward, WeightedSum) else [reward]
        for part in self.parts:
            if half and part.half_tolerance is not None:
                part.halve()
            for name, value in list(vars(part).items()):
                if hasattr(value, "differentiable") and hasattr(value, "size"):
                    setattr(part, name, _ShapesOnly(value))

    def score(self, images: torch.Tensor) -> torch.Tensor:
        """Scores (B,); one that is not computed by tensors, or elsewhere, costs nothing here."""
        total = torch.zeros(len(images), device=images.device)
        for part in self.parts:
            if modules_of(part):
                total = total + part.score(images, ("a photo",) * len(images)).float()
        return total

    def bytes(self, count: Callable[..., int]) -> int:
        """Bytes of all networks."""
        return count(*self.modules())

    def modules(self) -> list[torch.nn.Module]:
        """All networks."""
        return [module for part in self.parts for module in modules_of(part)]


class _ShapesOnly:
    """A reward's preprocessing; the path of 8-bit pictures gives its shape alone."""

    def __init__(self, preprocessing: Any) -> None:
        self._true = preprocessing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._true, name)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and images.requires_grad:
            return self._true.differentiable(images)
        return images.new_empty(len(images), 3, self._true.size, self._true.size)


def modules_of(reward: Reward) -> list[torch.nn.Module]:
    """The networks that a reward holds, itself or in an object of its own."""
    found = []
    for value in vars(reward).values():
        inner = value if isinstance(value, torch.nn.Module) else getattr(value, "model", None)
        if isinstance(inner, torch.nn.Module):
            found.append(inner)
    return found


@contextmanager
def counting(policy: Policy, counted: dict[str, float]) -> Iterator[None]:
    """Within it, function evaluations of the policy are added up by weight view."""
    names = ("velocity", "guided_velocity", "velocity_and_hidden")
    depth = 0

    def wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning, weights: str = "current", *a: Any, **k: Any
        ) -> Any:
            nonlocal depth
            before, depth = policy.function_evaluations, depth + 1
            try:
                return method(x, sigma, cond, weights, *a, **k)
            finally:
                depth -= 1
                if not depth:
                    counted[weights] = counted.get(weights, 0) + policy.function_evaluations - before

        return call

    for name in names:
        setattr(policy, name, wrapped(getattr(policy, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(policy, name)


def on_meta(batch: Batch) -> Batch:
    """The same rows without content, on the device."""
    fetch = getattr(batch, "fetched", None)
    batch = fetch() if fetch else batch

    def moved(value: torch.Tensor) -> torch.Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device=META)

    tensors = {name: moved(value) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    cond = Conditioning({k: moved(t) for k, t in batch.cond.tensors.items()}, moved(batch.cond.index))
    return replace(batch, cond=cond, scalars={k: moved(v) for k, v in batch.scalars.items()}, **tensors)
