"""Calls of a plug-in: what it raises or returns wrongly is told in a line with plug-in, hook, file and line."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import NoneType
from typing import Any, TypeVar

import torch

from flowbench.errors import RunError, UsageError, described, raised_at, shown_path
from flowbench.rollout import Batch, Compared, Draws, Loss, RolloutPlan

A = TypeVar("A")

# The hooks of an algorithm, and what each must return.
ALGORITHM_HOOKS: Mapping[str, type | tuple[type, ...]] = {
    "setup": object,
    "needs": (frozenset, set),
    "plan": RolloutPlan,
    "prepare": Batch,
    "draws": Draws,
    "measure": Mapping,
    "compare": Compared,
    "loss": Loss,
    "auxiliary_loss": (torch.Tensor, NoneType),
    "after_update": object,
    "after_iteration": object,
    "networks": Mapping,
    "state_dict": Mapping,
    "load_state_dict": object,
}


@contextmanager
def hook(owner: str, name: str, cls: type, passed: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Within it a plug-in's method runs; owner: "reward 'clip'", name: the method's.

    Raises RunError for what the method raises, an exit of the program included, with the line of the plug-in that it
    comes from. UsageError, RunError, a full disk, a lack of memory and `passed` are left as they are: who calls knows
    what to do about them.
    """
    try:
        yield
    except (UsageError, RunError):
        raise
    except SystemExit as error:
        place = raised_at(error, _file(cls))
        raise RunError(
            f"{owner} ends the program in {name}{place}, sys.exit({error.code!r}); raise RunError with the reason there"
        ) from error
    except Exception as error:
        if (
            isinstance(error, passed)
            or is_out_of_memory(error)
            or (isinstance(error, OSError) and error.errno == errno.ENOSPC)
        ):
            raise
        raise RunError(f"{owner} fails in {name}{raised_at(error, _file(cls))}: {described(error)}") from error


def guarded(algorithm: A) -> A:
    """The algorithm, with its hooks on it told as `hook` does, and their results' types checked."""
    cls: Any = type(algorithm)
    owner = f"algorithm '{cls.info.name}'"
    for name, expected in ALGORITHM_HOOKS.items():
        setattr(algorithm, name, _guarded(getattr(algorithm, name), owner, name, cls, expected))
    return algorithm


def _guarded(
    method: Callable[..., Any], owner: str, name: str, cls: type, expected: type | tuple[type, ...]
) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        with hook(owner, name, cls):
            result = method(*arguments, **named)
        if not isinstance(result, expected):
            kinds = expected if isinstance(expected, tuple) else (expected,)
            wanted = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
            raise RunError(f"{owner} returns {kind_of(result)} from {name}{defined_at(cls, name)}; expected {wanted}")
        return result

    return call


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, Exception) and should_reduce_batch_size(error)


def kind_of(value: Any) -> str:
    """What a value is, for a message: "None", "a str"."""
    return "None" if value is None else f"a {type(value).__name__}"


def defined_at(cls: type, name: str) -> str:
    """ " (plugin.py:12)": where a class has a method from."""
    code = getattr(inspect.unwrap(getattr(cls, name)), "__code__", None)
    return f" ({shown_path(code.co_filename)}:{code.co_firstlineno})" if code else ""


def _file(cls: type) -> str | None:
    try:
        return inspect.getfile(cls)
    except (OSError, TypeError):  # of a class without a file
        return None
