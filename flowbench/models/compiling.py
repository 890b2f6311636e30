"""torch.compile of a transformer's blocks, with what it makes kept for later runs."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from flowbench.caches import home
from flowbench.errors import UsageError

CACHE = "TORCHINDUCTOR_CACHE_DIR"
# Kinds of block, times views, times with and without gradient; PyTorch's own limit is 8, and what is beyond it is slow.
VARIANTS = 64


def cache_folder() -> Path:
    """Where compiled code is kept: in the user's cache folder, or where TORCHINDUCTOR_CACHE_DIR says."""
    return Path(os.environ.setdefault(CACHE, str(home() / "compiled")))


class Compiler:
    """Compiles the repeated blocks of transformers, each kind of block once; model: its name, for messages.

    Block by block, because that takes a tenth of the time of a whole transformer, because gradient checkpointing goes
    around blocks, and because what is left between them is little.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        cache_folder()
        torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)

    def compile(self, module: torch.nn.Module) -> None:
        """Let the blocks of a transformer compute with compiled code; it is made when they are first used.

        Raises UsageError for a module that does not say which its blocks are.
        """
        names = getattr(module, "_repeated_blocks", None) or getattr(module, "_no_split_modules", None)
        blocks = [block for block in module.modules() if type(block).__name__ in (names or ())]
        if not blocks:
            raise UsageError(f"model '{self.model}' has no blocks to compile; use training.compile=false")
        for block in blocks:
            if block._compiled_call_impl is None:
                block.compile()
