"""Delays the import of heavy packages until their first use.

The command line answers a misspelt name or key in well under a second, although plug-in files import torch on top.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _Delayed(ModuleType):
    """A module that executes itself when an attribute is first missed.

    importlib's LazyLoader cannot serve here: `import torch` reads the module's `__spec__`, at which it already loads.
    """

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        spec.loader.exec_module(self)
        return getattr(self, name)


def delay(name: str) -> None:
    """Make `import name` free; the package is imported when one of its attributes or submodules is first used."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    module = _Delayed(name)
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    sys.modules[name] = module


def no_grad(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.no_grad` as a decorator that does not import torch when the function is defined."""

    @wraps(function)
    def without_gradient(*args: P.args, **kwargs: P.kwargs) -> T:
        import torch

        with torch.no_grad():
            return function(*args, **kwargs)

    return without_gradient
