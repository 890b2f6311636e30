"""AdamW as an update uses it: a gradient that is not finite changes no weight, and no GPU is waited for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flowbench.training.metrics import Finite


def fused(device: torch.device) -> bool:
    """Whether a device computes a step of AdamW in one kernel.

    A CPU would too, but it rounds differently there, and a step is less than a hundredth of an update.
    """
    return device.type == "cuda"


def adamw(
    parameters: Sequence[torch.nn.Parameter],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
) -> torch.optim.AdamW:
    """PyTorch's AdamW, in the form that is best for where the parameters are."""
    kernel = True if parameters and fused(parameters[0].device) else None
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=kernel)


def step(optimizer: torch.optim.AdamW, norm: torch.Tensor, finite: Finite) -> None:
    """One step, if the norm of its gradient is finite.

    On a CPU `finite` is checked first, and raises RunError. On a GPU that would wait for all that was begun: there the
    kernel itself leaves out the step, as it does for a gradient scaler, and the next check says so.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    else:
        finite.check()
    optimizer.step()
