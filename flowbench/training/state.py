"""Nested training state on disk: tensors as safetensors, the rest as JSON in the same file's metadata; no pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_TENSOR = "__tensor__"


def save_state(path: Path, tree: Any) -> None:
    """Write a tree of dicts, lists, tensors and JSON scalars, to a temporary name first and then renamed."""
    tensors: dict[str, torch.Tensor] = {}
    plain = _detach(tree, "", tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, str(temporary), metadata={"tree": json.dumps(plain)})
    os.replace(temporary, path)


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote.

    Raises FileNotFoundError when there is none.
    """
    with safe_open(str(path), framework="pt") as file:
        return _attach(json.loads(file.metadata()["tree"]), file)


def _detach(node: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, torch.Tensor):
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(node, dict):
        # JSON knows only string keys; optimizer states are keyed by integers.
        return {"keys": [[k, _detach(v, f"{name}/{k}", tensors)] for k, v in node.items()]}
    if isinstance(node, list | tuple):
        return [_detach(v, f"{name}/{i}", tensors) for i, v in enumerate(node)]
    return node


def _attach(node: Any, file: Any) -> Any:
    if isinstance(node, dict):
        if _TENSOR in node:
            return file.get_tensor(node[_TENSOR])
        return {k: _attach(v, file) for k, v in node["keys"]}
    if isinstance(node, list):
        return [_attach(v, file) for v in node]
    return node
