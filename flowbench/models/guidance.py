"""Classifier-free guidance in one call of the model instead of two."""

from __future__ import annotations

import torch

from flowbench.rollout import Conditioning

# Rows up to which prompt and negative prompt share a call. So few leave a GPU waiting for its next kernel; more of them
# fill it anyway, and would take twice the memory at a time.
BOTH_AT_ONCE = 8


def with_negative(cond: Conditioning, negative: Conditioning) -> Conditioning:
    """The rows of `cond` and then those of `negative`; shorter texts are padded as they are among prompts."""
    tensors = {name: torch.cat(_same_length(tensor, negative.tensors[name])) for name, tensor in cond.tensors.items()}
    return Conditioning(tensors, torch.cat([cond.index, negative.index + len(next(iter(cond.tensors.values())))]))


def _same_length(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors (P, ...) with zeros, or False, at the end of the dimensions in which another is longer."""
    shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    return [t if list(t.shape[1:]) == shape else _padded(t, shape) for t in tensors]


def _padded(tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
    whole = tensor.new_zeros((len(tensor), *shape))
    whole[tuple(slice(n) for n in tensor.shape)] = tensor
    return whole
