"""Weights: safetensors files of which every key, dtype, shape and value is accounted for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

READ = ("F32", "F16", "BF16")  # as safetensors spells them
COUNTING = ("position_ids", "num_batches_tracked")  # last parts of names of buffers that hold integers


class TensorError(ValueError):
    """Weights are damaged or another model's; the message goes on where the file's name ends ("lacks 2 weights")."""


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises TensorError for a file of another format, or broken, and for tensors of other dtypes or with values that are
    not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_dtypes(path)
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise TensorError(f"is no safetensors file: {_one_line(error)}") from error
    check_values(tensors)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors.

    Raises TensorError for a file of another format, or broken.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise TensorError(f"is no safetensors file: {_one_line(error)}") from error


def check_dtypes(path: Path) -> None:
    """Raise TensorError if a file has tensors other than float32, float16 and bfloat16; they are not read for it.

    Loaders of models convert without a word whatever they find. Integers are left to buffers that count.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            dtypes = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TensorError(f"is no safetensors file: {_one_line(error)}") from error
    wrong = [
        name
        for name, dtype in dtypes.items()
        if dtype not in READ and not (dtype.startswith(("I", "U")) and name.endswith(COUNTING))
    ]
    if wrong:
        raise TensorError(
            f"has {_weights(wrong)} of a type that weights do not have, such as '{wrong[0]}' ({dtypes[wrong[0]]})"
        )


def check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise TensorError if a value is not finite; tensors without content are passed over."""
    wrong = [
        name
        for name, value in tensors.items()
        if not value.is_meta and value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if wrong:
        raise TensorError(f"has values that are not finite in {_weights(wrong)}, such as '{wrong[0]}'")


def check_keys(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise TensorError if there are names that a model has and its weights lack, or the reverse.

    Where there are both, some may have been renamed, and that is said.
    """
    lacking, foreign = sorted(missing), sorted(unexpected)
    if lacking and foreign:
        raise TensorError(
            f"lacks {_weights(lacking)}, such as '{lacking[0]}', and has {len(foreign)} that the model lacks, such as "
            f"'{foreign[0]}' (renamed?)"
        )
    if lacking:
        raise TensorError(f"lacks {_weights(lacking)}, such as '{lacking[0]}'")
    if foreign:
        raise TensorError(f"has {_weights(foreign)} that the model lacks, such as '{foreign[0]}'")


def fill(module: nn.Module, tensors: Mapping[str, torch.Tensor], unused: Collection[str] = ()) -> None:
    """Fill a module; every weight must be in `tensors` with its shape and kind, and nothing else may be.

    unused: names of weights that may be missing, since nothing depends on them.
    Raises TensorError that names the first deviation; the module is then as it was.
    """
    own = module.state_dict()
    check_keys(own.keys() - tensors.keys() - set(unused), tensors.keys() - own.keys())
    for name, value in tensors.items():
        if value.shape != own[name].shape:
            raise TensorError(
                f"has weight '{name}' of shape {tuple(value.shape)}; the model's is {tuple(own[name].shape)}"
            )
        if value.is_floating_point() != own[name].is_floating_point():
            raise TensorError(f"has weight '{name}' of type {value.dtype}; the model's is {own[name].dtype}")
    check_values(tensors)
    module.load_state_dict(tensors, strict=not unused)


def _weights(names: Collection[str]) -> str:
    return f"{len(names)} weight{'s' * (len(names) > 1)}"


def _one_line(error: Exception) -> str:
    from textwrap import shorten

    return shorten(str(error), 140, placeholder=" ...")
