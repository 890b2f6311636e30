"""Delays the import of heavy packages until their first use.

The command line answers a misspelt name or key in well under a second, although plug-in files import torch on top.
"""

from __future__ import annotations

import importlib.util
import sys


def delay(name: str) -> None:
    """Make `import name` free; the package is imported when one of its attributes is first used."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
