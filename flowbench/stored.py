"""Tensors of an iteration that lie elsewhere, mostly in host memory, and are fetched where they are computed with."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

HOST = torch.device("cpu")

# What a tensor says of itself without its values. A tensor's attributes are read by these functions too.
_DESCRIBING = {
    *(torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__, torch.Tensor.device.__get__),  # type: ignore[attr-defined]
    *(torch.Tensor.ndim.__get__, torch.Tensor.requires_grad.__get__, torch.Tensor.is_cuda.__get__),  # type: ignore[attr-defined]
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.is_floating_point),
}


class StoredRows(torch.Tensor):
    """Rows of a tensor that lies elsewhere: which ones, and where they are computed with. They are not copied.

    source: a tensor (N, ...); rows: which of its rows, (R,) int64 beside it, or None for all;
    device: where they go. It is a tensor (R, ...) on that device for whoever uses it: any operation first fetches
    the rows, each time anew. A selection of rows, `rows[index]` with index (K,) int64 or bool, fetches nothing.
    """

    source: torch.Tensor
    rows: torch.Tensor | None

    @staticmethod
    def __new__(cls, source: torch.Tensor, rows: torch.Tensor | None, device: torch.device) -> StoredRows:
        """A tensor without storage of its own."""
        shape = source.shape if rows is None else (len(rows), *source.shape[1:])
        empty: StoredRows = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=source.dtype, device=device)
        return empty

    def __init__(self, source: torch.Tensor, rows: torch.Tensor | None, device: torch.device) -> None:
        self.source, self.rows = source, rows

    def fetched(self, device: torch.device | None = None) -> torch.Tensor:
        """A plain tensor of the rows, on their device or another."""
        device = device or self.device
        if self.rows is None:
            return self.source.to(device, non_blocking=device.type == "cuda")
        if self.source.device.type != "cpu" or device.type != "cuda":
            return self.source.index_select(0, self.rows).to(device)
        # From pinned memory a copy does not wait for what the GPU does before it.
        pinned = torch.empty(self.shape, dtype=self.dtype, pin_memory=True)
        return torch.index_select(self.source, 0, self.rows, out=pinned).to(device, non_blocking=True)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], StoredRows):
            return args[0]._chosen(args[1])
        if func is torch.Tensor.cpu:  # not by way of the device
            return args[0].fetched(HOST)
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(StoredRows, StoredRows.fetched, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    def _chosen(self, key: Any) -> torch.Tensor:
        key = tree_map_only(torch.Tensor, lambda part: part.to(self.source.device), key)
        if isinstance(key, torch.Tensor) and key.ndim == 1:
            return stored_rows(self, key.nonzero()[:, 0] if key.dtype == torch.bool else key)
        if self.rows is None:
            return self.source[key].to(self.device)
        return self.fetched()[key]


def stored_rows(tensor: torch.Tensor, index: torch.Tensor) -> StoredRows:
    """Rows `index` (R,) int64 of a tensor (N, ...), stored or not, where it is; nothing is copied."""
    if not isinstance(tensor, StoredRows):
        return StoredRows(tensor, index.to(tensor.device), tensor.device)
    index = index.to(tensor.source.device)
    return StoredRows(tensor.source, index if tensor.rows is None else tensor.rows[index], tensor.device)


def stored_steps(path: torch.Tensor, image: torch.Tensor, step: torch.Tensor) -> StoredRows:
    """Rows path[image, step] of a tensor (B, T, ...), for image and step (R,) int64; nothing is copied."""
    whole = path.source if isinstance(path, StoredRows) else path
    index = image.to(whole.device) * whole.shape[1] + step.to(whole.device)
    return StoredRows(whole.flatten(0, 1), index, path.device)


class Shelf:
    """N rows that come in parts, kept in one tensor; beside a GPU it lies in host memory, pinned."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n, self.device, self.filled = n, device, 0
        self.rows: torch.Tensor | None = None

    def add(self, part: torch.Tensor) -> None:
        """Keep the next rows (K, ...)."""
        if self.rows is None and len(part) == self.n and self.device == HOST:
            self.rows = part
            return
        if self.rows is None:  # of one size from the start: putting parts together would take twice the memory
            shape = (self.n, *part.shape[1:])
            self.rows = torch.empty(shape, dtype=part.dtype, pin_memory=self.device.type == "cuda")
        self.rows[self.filled : self.filled + len(part)] = part
        self.filled += len(part)

    def whole(self) -> torch.Tensor:
        """All rows (N, ...), a tensor on the device for whoever uses it; at least one part must have come."""
        assert self.rows is not None
        return self.rows if self.device == HOST else StoredRows(self.rows, None, self.device)
