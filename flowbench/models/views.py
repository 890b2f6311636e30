"""Weight views: named states of the module that is tuned, as adapters of one module or as frozen copies."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from flowbench.errors import UsageError
from flowbench.models.families.base import Family
from flowbench.models.lora import TRAINED, adapted_layers, adapter_parameters, add_adapter, switch_adapter

ANCHOR = "anchor"
EXTRA_VIEWS = ("old", "average", ANCHOR)
VIEWS = ("current", "reference", *EXTRA_VIEWS)


@dataclass(frozen=True)
class Tuning:
    """Which weights are trained: "full", or "lora" of this rank and alpha on the family's layers for it."""

    kind: str = "full"
    lora_rank: int = 32
    lora_alpha: float = 64.0


class Views(ABC):
    """The weight views of one module. "current" is trained, "reference" is the module before tuning.

    `active` is the view that the module computes with outside of `use`.
    """

    def __init__(self, module: Any) -> None:
        self.current, self.active = module, "current"

    @abstractmethod
    def use(self, name: str) -> AbstractContextManager[torch.nn.Module]:
        """Within it, the module that it gives computes with this view; it may be entered again.

        Raises UsageError for a view that does not exist.
        """

    def modules(self) -> list[torch.nn.Module]:
        """The modules that hold the views' weights."""
        return [self.current]

    @abstractmethod
    def add(self, name: str) -> None:
        """Make a view, equal to the current weights."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether `add` made this view."""

    @abstractmethod
    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        """What distinguishes the view "current" or an added one from the others, in a fixed order.

        Raises UsageError for a view that does not exist.
        """

    @torch.no_grad()
    def update(self, name: str, decay: float) -> None:
        """view = decay * view + (1 - decay) * current."""
        view: list[torch.Tensor] = [*self.parameters(name)]
        torch._foreach_lerp_(view, [p.detach() for p in self.parameters("current")], 1.0 - decay)

    def state_dict(self) -> dict[str, Any]:
        """The trained weights and the added views."""
        names = ("current", *filter(self.has, EXTRA_VIEWS))
        return {name: [p.detach() for p in self.parameters(name)] for name in names}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name in ("current", *filter(state.__contains__, EXTRA_VIEWS)):
            for p, saved in zip(self.parameters(name), state[name], strict=True):
                p.copy_(saved)

    def checkpointing(self) -> Callable[..., Any]:
        """A function for `enable_gradient_checkpointing`: a block is recomputed with the view of its first pass.

        The backward pass comes when the module may compute with another view.
        """

        def run(block: torch.nn.Module, *arguments: Any) -> Any:
            name = self.active
            return checkpoint(
                block.__call__,
                *arguments,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), self.use(name)),
            )

        return run


class CopiedViews(Views):
    """All weights are trained; every other view is a frozen copy of the module."""

    def __init__(self, module: Any, gradient_checkpointing: bool) -> None:
        super().__init__(module)
        if gradient_checkpointing:
            module.enable_gradient_checkpointing(self.checkpointing())
        self._copies: dict[str, torch.nn.Module] = {"reference": copy.deepcopy(module)}
        module.requires_grad_(True)

    def use(self, name: str) -> AbstractContextManager[torch.nn.Module]:
        """As in the base class; no module ever changes."""
        return nullcontext(self._module(name))

    def add(self, name: str) -> None:
        """As in the base class."""
        self._copies[name] = copy.deepcopy(self.current).requires_grad_(False)

    def modules(self) -> list[torch.nn.Module]:
        """As in the base class."""
        return [self.current, *self._copies.values()]

    def has(self, name: str) -> bool:
        """As in the base class."""
        return name in EXTRA_VIEWS and name in self._copies

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        """As in the base class."""
        return list(self._module(name).parameters())

    def _module(self, name: str) -> torch.nn.Module:
        if name != "current" and name not in self._copies:
            _missing(name)
        module: torch.nn.Module = self.current if name == "current" else self._copies[name]
        return module


class AdapterViews(Views):
    """An adapter is trained; the reference is the module without one, an added view is another adapter."""

    def __init__(self, module: Any, tuning: Tuning, targets: tuple[str, ...], gradient_checkpointing: bool) -> None:
        super().__init__(module)
        self.tuning, self.targets = tuning, targets
        self._parameters: dict[str, list[torch.nn.Parameter]] = {}
        if gradient_checkpointing:
            module.enable_gradient_checkpointing(self.checkpointing())
        self._add_adapter(TRAINED)

    def use(self, name: str) -> AbstractContextManager[torch.nn.Module]:
        """As in the base class; afterwards the module computes as before."""
        if name not in VIEWS[:2] and not self.has(name):
            _missing(name)
        return _Switched(self, name)

    def add(self, name: str) -> None:
        """As in the base class."""
        self._add_adapter(name)
        self._switch("current")
        self.update(name, decay=0.0)

    def has(self, name: str) -> bool:
        """As in the base class."""
        return name in EXTRA_VIEWS and name in self._parameters

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        """As in the base class."""
        return self._parameters.get(name) or _missing(name)

    def activate(self, name: str) -> None:
        """Compute with this view from now on."""
        if name != self.active:
            self._switch(name)

    def _switch(self, name: str) -> None:
        switch_adapter(self._layers, {"current": TRAINED, "reference": None}.get(name, name))
        self.active = name
        # peft lets only the active adapter have gradients, if any. A backward pass drops the gradient of what is frozen
        # when it arrives, and it may arrive while another view is active.
        for view, parameters in self._parameters.items():
            for p in parameters:
                p.requires_grad_(view == "current")

    def _add_adapter(self, name: str) -> None:
        tuning, view = self.tuning, "current" if name == TRAINED else name
        add_adapter(self.current, name, tuning.lora_rank, tuning.lora_alpha, self.targets)
        self._layers = adapted_layers(self.current)
        self._parameters[view] = adapter_parameters(self.current, name)


class _Switched(AbstractContextManager[torch.nn.Module]):
    """Within it, an adapter view is active. A recomputed block enters it once per backward pass."""

    def __init__(self, views: AdapterViews, name: str) -> None:
        self._views, self._name = views, name
        self._before: list[str] = []

    def __enter__(self) -> torch.nn.Module:
        self._before.append(self._views.active)
        self._views.activate(self._name)
        module: torch.nn.Module = self._views.current
        return module

    def __exit__(self, *_: object) -> None:
        self._views.activate(self._before.pop())


def make_views(family: Family, tuning: Tuning, gradient_checkpointing: bool) -> Views:
    """The views of the family's transformer, ready to be trained as `tuning` says.

    Raises UsageError for an unknown kind of tuning, or LoRA where the family has no layers for it.
    """
    if tuning.kind == "full":
        return CopiedViews(family.transformer, gradient_checkpointing)
    if tuning.kind != "lora":
        raise UsageError(f"unknown training.tuning '{tuning.kind}'; use 'full' or 'lora'")
    if not family.lora_targets:
        raise UsageError(f"model '{family.preset.name}' has no layers for LoRA; use training.tuning=full")
    return AdapterViews(family.transformer, tuning, family.lora_targets, gradient_checkpointing)


def _missing(name: str) -> Any:
    raise UsageError(f"weight view '{name}' does not exist; call policy.add_view('{name}') in setup")
