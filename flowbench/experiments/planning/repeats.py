"""Blocks that a network repeats are computed once without gradient; the others take what the first one took."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from flowbench.experiments.planning.storages import META, Meter, Shape

LEAST = 3  # alike, for a list of modules to be a network's repeated blocks


@dataclass(frozen=True)
class _Run:
    """What one run of a block made and took. rise: bytes of its peak above what lived before it."""

    structure: Any
    made: tuple[Any, ...]
    rise: int
    flops: int


def skip_repeats(meter: Meter, modules: Iterable[torch.nn.Module]) -> None:
    """Let each run of a block that repeats one without gradient stand for all, in these modules from now on.

    Two runs are alike when blocks have the same weights by shape, arguments of the same shapes, and the same adapters.
    """
    for module in modules:
        for blocks in module.modules():
            if isinstance(blocks, torch.nn.ModuleList | torch.nn.Sequential) and len(blocks) >= LEAST:
                known: dict[Any, _Run] = {}
                for block in blocks:
                    block.forward = _remembering(meter, block, known)


def _remembering(meter: Meter, block: torch.nn.Module, known: dict[Any, _Run]) -> Callable[..., Any]:
    original = block.forward
    kind = (type(block), tuple((name, p.shape) for name, p in block.named_parameters()))
    adapters: list[Any] = [layer for layer in block.modules() if hasattr(layer, "active_adapters")]

    def forward(*args: Any, **kwargs: Any) -> Any:
        given, structure = tree_flatten((args, kwargs))
        tensors = [t for t in given if isinstance(t, torch.Tensor)]
        if torch.is_grad_enabled() or any(t.device != META for t in tensors):
            return original(*args, **kwargs)
        signature = tuple(Shape.of(t) if isinstance(t, torch.Tensor) else repr(t) for t in given)
        switched = tuple((layer.disable_adapters, tuple(layer.active_adapters)) for layer in adapters)
        dtypes = tuple(p.dtype for p in block.parameters())
        key = (kind, signature, repr(structure), switched, dtypes, torch.is_autocast_enabled("cpu"))
        run = known.get(key)
        if run is None:
            out, run = _observed(meter, lambda: original(*args, **kwargs), tensors)
            if run is not None:
                known[key] = run
            return out
        meter.peak = max(meter.peak, meter.live + run.rise)
        meter.flops += run.flops
        made = [m.made() if isinstance(m, Shape) else m for m in run.made]
        return tree_unflatten(made, run.structure)

    return forward


def _observed(meter: Meter, work: Callable[[], Any], given: list[torch.Tensor]) -> tuple[Any, _Run | None]:
    """The result of `work`, and what it took; None where the result is part of what was given."""
    peak, before, flops = meter.peak, meter.live, meter.flops
    meter.peak = before
    out = work()
    rise, meter.peak = meter.peak - before, max(peak, meter.peak)
    storages = {t.untyped_storage()._cdata for t in given}
    results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
    if any(t.device != META or t.untyped_storage()._cdata in storages for t in results):
        return out, None
    leaves, structure = tree_flatten(out)
    made = tuple(Shape.of(t) if isinstance(t, torch.Tensor) else t for t in leaves)
    return out, _Run(structure, made, rise, meter.flops - flops)
