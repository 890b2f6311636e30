"""Nested training state on disk: tensors as safetensors, the rest as JSON in the same file's metadata; no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flowbench.caches import digest
from flowbench.errors import RunError
from flowbench.files import write_atomically

_TENSOR = "__tensor__"
CHECKED = frozenset(("tree", "sha256"))  # all that a file says of itself; the first alone in files without a checksum


@dataclass(frozen=True)
class FrozenState:
    """A tree of dicts, lists, tensors and JSON scalars as it was at a moment.

    plain: the tree with names in the places of its tensors; tensors: those, on the host, of this state alone.
    """

    plain: Any
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it, with a checksum over all of it."""
        tree, tensors = json.dumps(self.plain), dict(self.tensors)
        said = {"tree": tree, "sha256": _checksum(tree, tensors)}
        write_atomically(path, lambda place: save_file(tensors, place, metadata=said))


def freeze(tree: Any, memory: Mapping[str, torch.Tensor] | None = None) -> FrozenState:
    """The tree as it is now. memory: tensors that are no longer needed, which are used again where they fit."""
    tensors: dict[str, torch.Tensor] = {}
    plain = _detach(tree, "", tensors, memory or {})
    return FrozenState(plain, tensors)


def save_state(path: Path, tree: Any) -> None:
    """Write a tree of dicts, lists, tensors and JSON scalars, with a checksum."""
    freeze(tree).save(path)


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote.

    Raises FileNotFoundError when there is none; RunError, in one line, for a file that is damaged: whose content is not
    that of its checksum, which files of flowbench 0.1 do not have.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        whole = said.keys() == CHECKED and said["sha256"] == _checksum(said["tree"], tensors)
        if whole or said.keys() == {"tree"}:
            return _attach(json.loads(said["tree"]), tensors)
        reason = "its content is not that of its checksum"
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise RunError(f"'{path}' is damaged: {reason}")


def _checksum(tree: str, tensors: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256(f"{digest(tensors)}\n{tree}".encode()).hexdigest()


def _detach(node: Any, name: str, tensors: dict[str, torch.Tensor], memory: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(node, torch.Tensor):
        tensors[name] = _copy(node.detach(), memory.get(name))
        return {_TENSOR: name}
    if isinstance(node, dict):
        # JSON knows only string keys; optimizer states are keyed by integers.
        return {"keys": [[k, _detach(v, f"{name}/{k}", tensors, memory)] for k, v in node.items()]}
    if isinstance(node, list | tuple):
        return [_detach(v, f"{name}/{i}", tensors, memory) for i, v in enumerate(node)]
    return node


def _copy(tensor: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
    if memory is not None and memory.shape == tensor.shape and memory.dtype == tensor.dtype:
        return memory.copy_(tensor)
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _attach(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(node, dict):
        if _TENSOR in node:
            return tensors[node[_TENSOR]]
        return {k: _attach(v, tensors) for k, v in node["keys"]}
    if isinstance(node, list):
        return [_attach(v, tensors) for v in node]
    return node
