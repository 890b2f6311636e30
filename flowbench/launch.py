"""How this process was started: alone, or as one of several by `accelerate launch` or `torchrun`.

Both say so in the environment. Nothing here imports torch, so that the command line can ask.
"""

from __future__ import annotations

import os

from flowbench.errors import UsageError


def count() -> int:
    """How many processes were started together, on all machines."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """This process's number among them, from 0."""
    return _number("RANK", 0) if count() > 1 else 0


def local_rank() -> int:
    """Its number among those of its machine, which is that of its GPU."""
    return _number("LOCAL_RANK", 0) if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def check_alone(what: str) -> None:
    """Raise UsageError if there are several processes: `what` is nothing that they could share."""
    if count() > 1:
        raise UsageError(
            f"{what} is for one process, and {count()} were started; start it without accelerate launch or torchrun"
        )


def _number(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdigit():
        raise UsageError(f"the environment variable {name} is '{value}'; accelerate launch and torchrun set it")
    return int(value)
