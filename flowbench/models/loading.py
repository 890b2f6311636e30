"""Networks of a pipeline and their weights: read from safetensors files alone, every weight accounted for."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Container, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch

from flowbench.errors import RunError
from flowbench.reading.tensors import TensorError, check_dtypes, check_keys, check_values
from flowbench.testbeds.shapes.weights import check_shipped

if TYPE_CHECKING:
    from collections.abc import Iterator

INDEX = "model_index.json"
# What a whole language model has beside the encoder that a pipeline needs of it.
HEADS = ("lm_head.weight",)


def load_networks(
    folder: Path, wanted: Container[str], dtype: torch.dtype, without: Container[str] = ()
) -> dict[str, torch.nn.Module]:
    """The networks among a pipeline's parts, by the names that its index has for them.

    wanted: names of the pipeline's parts; without: those that are left out.
    Raises RunError that names the part whose weights are not those of its network.
    """
    check_shipped(folder)
    found = {}
    for name, entry in _index(folder).items():
        if name not in wanted or name in without or not isinstance(entry, list) or None in entry:
            continue
        kind = getattr(importlib.import_module(str(entry[0])), str(entry[1]), None)
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
            found[name] = load_network(kind, folder / name, dtype)
    return found


def load_network(kind: Any, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """A network of diffusers or transformers from its own folder; nothing of it is left at its initial weights.

    Raises RunError, with the first weight that is missing, unknown, of another shape or kind, or not finite.
    """
    try:
        for file in sorted(folder.glob("*.safetensors")):
            _named(file, check_dtypes, file)
        spelled = {"torch_dtype" if kind.__module__.startswith("diffusers.") else "dtype": dtype}
        with quiet():
            module, info = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **spelled)
        unexpected = [name for name in info["unexpected_keys"] if name not in HEADS]
        check_keys(info["missing_keys"], unexpected)
        if mismatched := sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in _odd(info)):
            raise TensorError(f"has {len(mismatched)} weights of another shape, such as '{mismatched[0]}'")
        check_values(module.state_dict())
    except TensorError as error:
        raise RunError(f"'{folder}' {error}; is it another model's, or damaged? fetch or write it again") from error
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"'{folder}' does not hold a {kind.__name__}: {brief(error)}") from error
    loaded: torch.nn.Module = module
    return loaded


def _odd(info: Mapping[str, Any]) -> list[Any]:
    return [*info.get("mismatched_keys", ()), *info.get("error_msgs", ())]


def _named(file: Path, check: Any, *arguments: Any) -> None:
    try:
        check(*arguments)
    except TensorError as error:
        raise RunError(f"'{file}' {error}; is it another model's, or damaged? fetch or write it again") from error


def _index(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"'{folder / INDEX}' is not JSON: {brief(error)}") from error
    return content if isinstance(content, dict) else {}


@contextmanager
def quiet() -> Iterator[None]:
    """transformers warns of missing weights in a table of many lines; they are an error here, in one."""
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def brief(error: Exception) -> str:
    """The first words of an error, on one line."""
    return shorten(str(error), 140, placeholder=" ...")
