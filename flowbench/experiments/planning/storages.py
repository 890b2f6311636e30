"""Counts the bytes of living tensors and the floating point operations of a computation without content.

Meta tensors have shapes and nothing else, so that a model of any size computes in seconds and in no memory. The device
"meta" stands for the GPU here: what lies on it is counted, what lies on the host is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

META = torch.device("meta")
BLOCK = 512  # bytes; the GPU's allocator rounds up to them
aten = torch.ops.aten
_linear, _layer_norm, _autocast = torch.nn.functional.linear, torch.nn.functional.layer_norm, torch.autocast


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _flash_backward(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


# torch counts those of its GPU kernels.
_ON_CPU: Mapping[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}


# What initialisation does to weights without content: nothing, at length.
_FILLED = {aten.uniform_, aten.normal_, aten.fill_, aten.zero_, aten.copy_, aten.mul_, aten.add_, aten.clamp_}


class Meter(TorchDispatchMode):
    """Within it, storages on `device` are counted from the operation that makes them to their end, and operations too.

    live, peak: bytes now and at most since `start`; flops: multiplications and additions of matrix products,
    convolutions and attention, since `start`.
    """

    def __init__(self, device: torch.device = META) -> None:
        super().__init__()
        self.device = device
        self.live = self.peak = self.flops = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        self._results: dict[Any, list[Shape] | None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; to be hidden from the compiler costs its import, and time at every operation."""
        return False

    def start(self) -> None:
        """Forget the peak and the operations so far."""
        self.peak, self.flops = self.live, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = self._shapes(func, args, kwargs) if self.device == META else func(*args, **kwargs)
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        packet = func._overloadpacket
        if packet in _ON_CPU:
            self.flops += _ON_CPU[packet](*args)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        return out

    def _shapes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation on meta tensors; that of one which was seen before is not worked out again."""
        if not _is_pure(func):
            return _without_content(func, args, kwargs)
        key, devices = _signature(func, args, kwargs)
        if len(devices) > 1 and META in devices:  # what an algorithm kept of its rollout lies on the host here
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(META), (args, kwargs))
            key, devices = _signature(func, args, kwargs)
        if key is None or META not in devices:
            return _without_content(func, args, kwargs)
        known = self._results.get(key)
        if known is None:
            out = _without_content(func, args, kwargs)
            made = [out] if isinstance(out, torch.Tensor) else list(out)
            if all(isinstance(t, torch.Tensor) and t.device == META for t in made):
                self._results[key] = [Shape.of(t) for t in made]
            return out
        made = [shape.made() for shape in known]
        return made[0] if len(func._schema.returns) == 1 else tuple(made)

    def count(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, unless it is counted already or lies elsewhere."""
        if tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def count_module(self, module: torch.nn.Module) -> None:
        """Count all weights and buffers of a module."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.count(tensor)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size


class Shape(NamedTuple):
    """All that a meta tensor is."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Shape:
        """A tensor's."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def made(self) -> torch.Tensor:
        """A new tensor of it, on the device "meta"."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=META)


@cache
def _is_pure(func: Any) -> bool:
    """Whether an operation makes new tensors and does nothing else."""
    schema = func._schema
    parts = (*schema.arguments, *schema.returns)
    plain = all(str(r.type) == "Tensor" for r in schema.returns)
    return bool(schema.returns) and plain and all(part.alias_info is None for part in parts)


def _signature(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, set[torch.device]]:
    """What decides the shapes of an operation's results, None if that is not known; and where its arguments lie."""
    devices: set[torch.device] = set()
    parts: list[Any] = [func]
    for value in (*args, *kwargs.items()):
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, torch.Tensor):
                devices.add(item.device)
                parts.append(Shape.of(item))
            elif isinstance(item, list):
                parts.append(tuple(item))
            else:
                parts.append(item)
        parts.append(None)
    try:
        hash(key := tuple(parts))
    except TypeError:
        return None, devices
    return key, devices


def _without_content(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation, where it asks for content that nobody knows as if it concerned every row."""
    first = args[0] if args else None
    if not isinstance(first, torch.Tensor) or first.device != META:
        return func(*args, **kwargs)
    if func._overloadpacket in _FILLED:
        return first
    if func is aten._local_scalar_dense.default:
        return first.dtype.is_floating_point and 1.0
    if func is aten.nonzero.default:
        return torch.empty(len(first), first.ndim, dtype=torch.int64, device=META)
    if func is aten._to_copy.default and kwargs.get("device", META) != META:
        return torch.empty(first.shape, dtype=kwargs.get("dtype") or first.dtype)
    return func(*args, **kwargs)


def _enter_autocast(device_type: str, *arguments: Any, **named: Any) -> Any:
    """Autocast of the CPU stands for that of a meta tensor's device, which has none; recomputed blocks keep it."""
    return _autocast("cpu" if device_type == "meta" else device_type, *arguments, **named)


def _half(x: torch.Tensor | None) -> torch.Tensor | None:
    casts = x is not None and x.device == META and torch.is_autocast_enabled("cpu")
    return x.to(torch.get_autocast_dtype("cpu")) if x is not None and casts and x.is_floating_point() else x


def _linear_as_on_gpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _linear(_half(x), _half(weight), _half(bias))  # type: ignore[arg-type]


def _layer_norm_as_on_gpu(x: torch.Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    if x.device == META and torch.is_autocast_enabled("cpu"):
        x, weight, bias = x.float(), *(None if p is None else p.float() for p in (weight, bias))
    return _layer_norm(x, shape, weight, bias, eps)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention by a kernel that keeps no matrix of weights, as every kernel for a GPU is."""
    out, _ = aten._scaled_dot_product_flash_attention_for_cpu(
        *map(_half, (query, key, value)), 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )
    return out


@contextmanager
def simulated() -> Iterator[Meter]:
    """Within it, what is made on the device "meta" is counted as if on a GPU, with a GPU's autocast and attention."""
    functional = torch.nn.functional
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "autocast", _enter_autocast))
        stack.enter_context(patch.object(functional, "linear", _linear_as_on_gpu))
        stack.enter_context(patch.object(functional, "layer_norm", _layer_norm_as_on_gpu))
        stack.enter_context(patch.object(functional, "scaled_dot_product_attention", _attention))
        yield stack.enter_context(Meter())
