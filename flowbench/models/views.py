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
from flowbench.models.stand_ins import StandIn, converted, merged

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

    `active` is the view that the module computes with outside of `use`, and `standing` what stands in for its weights,
    if anything does; `precision` is that of views whose weights are `frozen`, None for their own.
    """

    def __init__(self, module: Any) -> None:
        self.current, self.active = module, "current"
        self.standing: StandIn | None = None
        self.precision: torch.dtype | None = None
        self._stand_ins: dict[tuple[str, torch.dtype | None], tuple[list[int], StandIn]] = {}

    def use(self, name: str, frozen: bool = False) -> AbstractContextManager[torch.nn.Module]:
        """Within it, the module that it gives computes with this view; it may be entered again.

        frozen: without any gradient, by `StandIn` where that is faster. What stands in for "current" is made once and
        used until `forget`. Raises UsageError for a view that does not exist.
        """
        self._check(name)
        return _Switched(self, name, self._stand_in(name) if frozen else None)

    def activate(self, name: str, standing: StandIn | None) -> None:
        """Compute with this view from now on, and with what stands in for its weights."""
        if (name, standing) == (self.active, self.standing):
            return
        if self.standing:
            self.standing.leave()
        self._switch(name, adapters=standing is None or standing.adapters)
        self.active, self.standing = name, standing
        if standing:
            standing.enter()

    def forget(self, everything: bool = False) -> None:
        """Make anew what stands in for weights: for those that may have changed unseen, or for `everything`."""
        kept = {} if everything else self._stand_ins
        self._stand_ins = {key: kept[key] for key in kept if key[0] in EXTRA_VIEWS and key[1] is None}

    def _stand_in(self, name: str) -> StandIn | None:
        """What stands in for a view's weights: what was made before, if the weights are as they were."""
        weights = [] if name == "reference" else [p._version for p in self.parameters(name)]
        versions, made = self._stand_ins.get((name, self.precision), (None, None))
        if made is None or versions != weights:
            made = self._make_stand_in(name)
            if made is not None:
                self._stand_ins[name, self.precision] = (weights, made)
        return made

    @abstractmethod
    def module(self, name: str) -> torch.nn.Module:
        """The module that computes with this view."""

    @abstractmethod
    def _check(self, name: str) -> None: ...

    @abstractmethod
    def _switch(self, name: str, adapters: bool) -> None:
        """Let the module compute with this view, with its adapter or without any."""

    @abstractmethod
    def _make_stand_in(self, name: str) -> StandIn | None: ...

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
            again = _Switched(self, self.active, self.standing)
            return checkpoint(
                block.__call__, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), again)
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
        self._check(name)
        return list(self.module(name).parameters())

    def module(self, name: str) -> torch.nn.Module:
        """As in the base class."""
        module: torch.nn.Module = self.current if name == "current" else self._copies[name]
        return module

    def _check(self, name: str) -> None:
        if name != "current" and name not in self._copies:
            _missing(name)

    def _switch(self, name: str, adapters: bool) -> None:
        pass  # no module ever changes

    def _make_stand_in(self, name: str) -> StandIn | None:
        if self.precision is None:
            return None
        return StandIn(converted(self.module(name).parameters(), self.precision), adapters=False)


class AdapterViews(Views):
    """An adapter is trained; the reference is the module without one, an added view is another adapter."""

    def __init__(self, module: Any, tuning: Tuning, targets: tuple[str, ...], gradient_checkpointing: bool) -> None:
        super().__init__(module)
        self.tuning, self.targets = tuning, targets
        self._parameters: dict[str, list[torch.nn.Parameter]] = {}
        if gradient_checkpointing:
            module.enable_gradient_checkpointing(self.checkpointing())
        self._add_adapter(TRAINED)

    def add(self, name: str) -> None:
        """As in the base class."""
        self._add_adapter(name)
        self._switch("current", adapters=True)
        self.update(name, decay=0.0)

    def has(self, name: str) -> bool:
        """As in the base class."""
        return name in EXTRA_VIEWS and name in self._parameters

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        """As in the base class."""
        return self._parameters.get(name) or _missing(name)

    def module(self, name: str) -> torch.nn.Module:
        """As in the base class; it is always the same."""
        module: torch.nn.Module = self.current
        return module

    def _check(self, name: str) -> None:
        if name not in VIEWS[:2] and not self.has(name):
            _missing(name)

    def _make_stand_in(self, name: str) -> StandIn | None:
        """The adapter merged into the weights.

        Weights that are kept in half precision are left alone: what an adapter adds to one is at first less than half
        the distance to the next number, and would be lost. The adapter is then given their precision, in which it is
        computed under autocast in any case; that saves converting its inputs to float32 and back.
        """
        adapter = self._adapter(name)
        dtype = self._layers[0].get_base_layer().weight.dtype
        if dtype.itemsize < 4:
            return StandIn(converted(self.parameters(name), dtype), adapters=True) if adapter else None
        together = merged(self._layers, adapter) if adapter else {}
        if self.precision:
            own = {id(p) for view in self._parameters.values() for p in view}
            base = (p for p in self.current.parameters() if id(p) not in own)
            together = converted(base, self.precision, instead=together)
        return StandIn(together, adapters=False) if together else None

    def _adapter(self, name: str) -> str | None:
        return {"current": TRAINED, "reference": None}.get(name, name)

    def _switch(self, name: str, adapters: bool) -> None:
        switch_adapter(self._layers, self._adapter(name) if adapters else None)
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
    """Within it, a view is active. A recomputed block enters it once per backward pass."""

    def __init__(self, views: Views, name: str, standing: StandIn | None) -> None:
        self._views, self._name, self._standing = views, name, standing
        self._before: list[tuple[str, StandIn | None]] = []

    def __enter__(self) -> torch.nn.Module:
        self._before.append((self._views.active, self._views.standing))
        self._views.activate(self._name, self._standing)
        return self._views.module(self._name)

    def __exit__(self, *_: object) -> None:
        self._views.activate(*self._before.pop())


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
