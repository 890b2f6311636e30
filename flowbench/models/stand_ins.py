"""Weights that stand in for a module's own while no gradient reaches them: adapters merged, or half precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

Tensors: TypeAlias = dict[torch.nn.Parameter, torch.Tensor]


@dataclass(eq=False)
class StandIn:
    """What stands in for some parameters; their own tensors are kept aside, and come back as they were.

    tensors: parameter to its stand-in; adapters: whether the module still computes with its adapters.
    """

    tensors: Mapping[torch.nn.Parameter, torch.Tensor]
    adapters: bool
    _own: list[torch.Tensor] = field(default_factory=list)

    def enter(self) -> None:
        """Put the stand-ins in place."""
        self._own = [p.data for p in self.tensors]
        for p, tensor in self.tensors.items():
            p.data = tensor

    def leave(self) -> None:
        """Put the parameters' own tensors back."""
        for p, own in zip(self.tensors, self._own, strict=True):
            p.data = own
        self._own = []

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it, the stand-ins are in place."""
        self.enter()
        try:
            yield
        finally:
            self.leave()


@torch.no_grad()
def merged(layers: Sequence[Any], adapter: str) -> Tensors:
    """The weights of these layers with their adapter added: one product per layer instead of three."""
    return {
        weight: weight + layer.get_delta_weight(adapter)
        for layer in layers
        for weight in [layer.get_base_layer().weight]
    }


def converted(parameters: Iterable[torch.nn.Parameter], dtype: torch.dtype, instead: Mapping[Any, Any] = {}) -> Tensors:
    """The parameters in another precision; those of `instead` by what stands in for them already."""
    return {p: instead.get(p, p.data).to(dtype) for p in parameters if p.is_floating_point()}
