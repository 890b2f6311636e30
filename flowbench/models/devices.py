"""Where a model runs."""

from __future__ import annotations

import torch

from flowbench.errors import UsageError


def pick_device(name: str) -> torch.device:
    """ "auto" is a GPU if there is one.

    Raises UsageError for a device that torch cannot use here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return device
