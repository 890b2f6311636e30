"""Where a model runs."""

from __future__ import annotations

import platform

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
    if device.type == "meta":
        raise UsageError("device 'meta' has shapes and computes nothing; use cpu, or cuda where there is a GPU")
    return device


def device_identity(device: torch.device) -> str:
    """What of a device decides the last bits of a result: the kind, torch's version, and on a CPU the threads."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        name = f"{device.type} {platform.machine()} {capability} x {threads}"
    return f"{name}, torch {torch.__version__}, {torch.get_float32_matmul_precision()}"
