"""Where the code of algorithms and rewards comes from, and its hash: a sign flipped in a plug-in is another plug-in.

flowbench's own files are hashed for the record alone: which flowbench it was, the commit says, and a comment makes no
other result. Of a plug-in that is not flowbench's own the hash is part of a result's identity.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import FunctionType
from typing import Any

from flowbench import __version__
from flowbench.record import OWN, Source
from flowbench.registry import PLUGIN_FILE, Registry, algorithms, rewards


def sources(algorithm: str, names: tuple[str, ...]) -> dict[str, Source]:
    """The source of an algorithm, as "algorithm", and of rewards by name.

    Raises UsageError for names that no plug-in has.
    """
    return {**{name: source(rewards, name) for name in names}, "algorithm": source(algorithms, algorithm)}


def source(registry: Registry[Any], name: str) -> Source:
    """The source of one plug-in; one of flowbench's own is not imported for it.

    Raises UsageError for an unknown name, or a plug-in that cannot be imported.
    """
    module = registry.module(name)
    if module.partition(".")[0] == OWN:
        return _own(module)
    cls: Any = registry.get(name).cls
    return _foreign(cls)


def is_own(found: Source) -> bool:
    """Whether it is flowbench's own, so that the commit says what it is."""
    return found.distribution == OWN


@functools.cache
def _own(module: str) -> Source:
    spec = importlib.util.find_spec(module)
    content = Path(spec.origin).read_bytes() if spec and spec.origin else b""
    return Source(distribution=OWN, version=__version__, sha256=hashlib.sha256(content).hexdigest())


@functools.cache  # as it was when it was imported, as nearly as can be told
def _foreign(cls: type) -> Source:
    top = cls.__module__.partition(".")[0]
    names = () if top.startswith(PLUGIN_FILE) else packages_distributions().get(top, ())  # which takes a while
    distribution = names[0] if names else None
    return Source(
        distribution=distribution,
        version=version(distribution) if distribution else None,
        sha256=_hash(cls, top),
    )


def _hash(cls: type, top: str) -> str:
    """Over all Python files of the class's package, or its file, or what is known of a class without one."""
    whole = hashlib.sha256()
    package = sys.modules.get(top)
    folders = [Path(folder) for folder in getattr(package, "__path__", ())]
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if folders:
        for folder in folders:
            for path in sorted(folder.rglob("*.py")):
                whole.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    elif file is not None and Path(file).is_file():
        whole.update(Path(file).read_bytes())
    else:  # written at a prompt or in a notebook
        for name, value in sorted(vars(cls).items()):
            if isinstance(value, FunctionType):
                whole.update(name.encode() + _text(value))
    return whole.hexdigest()


def _text(function: FunctionType) -> bytes:
    try:
        return inspect.getsource(function).encode()
    except OSError:
        return function.__code__.co_code
