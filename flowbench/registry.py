"""Plug-ins: one generic registry for algorithms and for rewards.

Built-in and foreign plug-ins are found the same way: through entry points, or in a Python file given by `--plugin`.
Names are known from the entry points alone, so that a misspelt name is answered before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from flowbench.declared import read_declaration, summary
from flowbench.errors import UsageError, described, did_you_mean, raised_at
from flowbench.names import check_plugin_name

PLUGIN_FILE = "flowbench_plugin_"  # begins the name of the module of a plug-in file
NEEDS = frozenset({"endpoint", "states", "log_prob", "reward_grad", "old"})

OTHER = "other"
# How an algorithm turns a reward into an update; tables and pictures sort and colour by it.
FAMILIES = ("forward-process", "policy-gradient", "reward-gradient", "preference", OTHER)


@dataclass(frozen=True)
class AlgorithmInfo:
    """What an algorithm says of itself.

    needs: a subset of NEEDS, checked against sampler and reward before loading; family: one of FAMILIES.
    """

    name: str
    paper: str
    needs: frozenset[str]
    summary: str
    family: str = OTHER


@dataclass(frozen=True)
class RewardInfo:
    """What a reward says of itself.

    range: the scores' lower and upper bound; truth: True for the testbed's own measure, which is no proxy;
    differentiable: gradients reach the images' pixels; domain: what it scores, "images", or "points" of an analytic
    model; discrete: it takes few values, so that all images of an iteration may rightly have the same one;
    requirements: packages, as pip takes them, whose pins may conflict with flowbench's; the reward then lives in a
    worker with an environment of its own (docs/rewards/workers.md); reads_prompt: False if it scores the pixels alone;
    needs_metadata: keys that every prompt's metadata must have ("category" is the prompt's category); needs_reference:
    every prompt must have a reference image. Needs are checked before anything is loaded.
    """

    name: str
    source: str
    licence: str
    range: tuple[float, float]
    differentiable: bool
    truth: bool
    summary: str
    domain: str = "images"
    discrete: bool = False
    requirements: tuple[str, ...] = ()
    reads_prompt: bool = True
    needs_metadata: tuple[str, ...] = ()
    needs_reference: bool = False


Info = TypeVar("Info", AlgorithmInfo, RewardInfo)


@dataclass(frozen=True)
class Plugin(Generic[Info]):
    """A registered class with its metadata."""

    cls: type[Any]
    info: Info


@dataclass
class Registry(Generic[Info]):
    """Plug-ins of one kind by name. make_info: their metadata from name, summary and the decorator's arguments."""

    kind: str
    group: str
    make_info: Callable[..., Info]
    loaded: dict[str, Plugin[Info]] = field(default_factory=dict)

    def add(self, plugin: Plugin[Info]) -> None:
        """Register a plug-in.

        Raises UsageError for a name that another class already has, or that no plug-in can have.
        """
        name, cls = plugin.info.name, plugin.cls
        check_plugin_name(self.kind, name)
        other = self.loaded.get(name)
        taken = {other.cls.__module__} if other and _identity(other.cls) != _identity(cls) else set()
        # Nor may a plug-in file shadow an installed one that is not loaded yet.
        taken |= {p.module for p in self._points() if p.name == name and _package(p.module) != _package(cls.__module__)}
        if taken:
            raise UsageError(
                f"{self.kind} '{name}' is defined twice: in {' and in '.join(sorted(taken))} and in {cls.__module__}; "
                "rename one"
            )
        self.loaded[plugin.info.name] = plugin

    def names(self) -> list[str]:
        """All known names, without importing a plug-in."""
        return sorted({point.name for point in self._points()} | set(self.loaded))

    def get(self, name: str) -> Plugin[Info]:
        """The plug-in of that name, imported now if need be.

        Raises UsageError for an unknown name, a broken module, or a name that two packages claim.
        """
        points = [p for p in self._points() if p.name == name]
        if name not in self.loaded:
            if not points:
                raise UsageError(f"unknown {self.kind} '{name}'{did_you_mean(name, self.names())}")
            if len({p.value for p in points}) > 1:
                raise UsageError(
                    f"{self.kind} '{name}' is claimed by {' and '.join(p.value for p in points)}; uninstall one"
                )
            try:
                points[0].load()
            except UsageError:
                raise
            except (Exception, SystemExit) as error:
                fault = _import_fault(error, None)
                raise UsageError(f"{self.kind} '{name}' ({points[0].value}) cannot be imported: {fault}") from error
            if name not in self.loaded:
                raise UsageError(f"entry point '{name}' ({points[0].value}) registers no {self.kind} of that name")
        return self.loaded[name]

    def require(self, name: str) -> None:
        """Raise UsageError for an unknown name, without importing a plug-in."""
        if name not in self.names():
            raise UsageError(f"unknown {self.kind} '{name}'{did_you_mean(name, self.names())}")

    def module(self, name: str) -> str:
        """The module that defines the plug-in of that name, without importing it where an entry point says so.

        Raises UsageError for an unknown name.
        """
        self.require(name)
        if name in self.loaded:
            return str(self.loaded[name].cls.__module__)
        return next(p.module for p in self._points() if p.name == name)

    def describe(self, name: str) -> Info:
        """The metadata of the plug-in of that name, from its source where that says all, else from the plug-in.

        Raises UsageError as `get` does.
        """
        points = [p for p in self._points() if p.name == name]
        if name not in self.loaded and len({p.value for p in points}) == 1:
            found = read_declaration(points[0].module, f"register_{self.kind}", name)
            if found:
                return self.make_info(name, found.summary, **found.arguments)
        return self.get(name).info

    def _points(self) -> tuple[EntryPoint, ...]:
        return _entry_points(self.group, tuple(sys.path))


@lru_cache(maxsize=8)
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of all packages on a path; finding them takes as long as importing a small package."""
    return tuple(entry_points(group=group))


_SECRETS = re.compile(r"https?://(.*@|[^+]*[?#])", re.IGNORECASE | re.DOTALL)


def is_url(name: str) -> bool:
    """Whether a reward's name is the address of a server."""
    return name.startswith(("http://", "https://"))


class _Rewards(Registry["RewardInfo"]):
    """Rewards; the address of a server stands for the reward `remote`."""

    def require(self, name: str) -> None:
        super().require(_plain(name))

    def describe(self, name: str) -> RewardInfo:
        return super().describe(_plain(name))

    def get(self, name: str) -> Plugin[RewardInfo]:
        return super().get(_plain(name))

    def module(self, name: str) -> str:
        return super().module(_plain(name))


def check_address(text: str) -> None:
    """Raise UsageError, without repeating it, for a reward's address that holds credentials.

    They would stand in paths, records and logs, as does whatever a query says.
    """
    if _SECRETS.search(text):
        raise UsageError(
            "a reward's address must have no user, password, query or fragment; set FLOWBENCH_REWARD_TOKEN instead"
        )


def _plain(name: str) -> str:
    if not is_url(name):
        return name
    check_address(name)
    return "remote"


def _algorithm_info(name: str, summary: str, *, paper: str, needs: Iterable[str], family: str = OTHER) -> AlgorithmInfo:
    for need in set(needs) - NEEDS:
        raise UsageError(f"algorithm '{name}' needs '{need}', which is unknown{did_you_mean(need, NEEDS)}")
    if family not in FAMILIES:
        raise UsageError(
            f"algorithm '{name}' is of family '{family}', which is unknown{did_you_mean(family, FAMILIES)}"
        )
    return AlgorithmInfo(name, paper, frozenset(needs), summary, family)


def _reward_info(
    name: str, summary: str, *, requirements: Iterable[str] = (), needs_metadata: Iterable[str] = (), **declared: Any
) -> RewardInfo:
    if isinstance(needs_metadata, str):
        raise UsageError(f"reward '{name}': write needs_metadata=('{needs_metadata}',), a tuple of keys")
    values: dict[str, Any] = {"truth": False, **declared}
    needs = tuple(needs_metadata)
    return RewardInfo(name=name, summary=summary, requirements=tuple(requirements), needs_metadata=needs, **values)


algorithms: Registry[AlgorithmInfo] = Registry("algorithm", "flowbench.algorithms", _algorithm_info)
rewards: Registry[RewardInfo] = _Rewards("reward", "flowbench.rewards", _reward_info)

C = TypeVar("C", bound=type)


def _identity(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _package(module: str) -> str:
    return module.partition(".")[0]


def register_algorithm(name: str, *, paper: str, needs: set[str], family: str = OTHER) -> Callable[[C], C]:
    """Class decorator for an algorithm; the docstring's first line becomes its summary.

    family: how it turns a reward into an update, one of FAMILIES; tables and pictures colour by it.
    Raises UsageError for a need or a family that the core does not know, or a name that is taken.
    """

    def register(cls: C) -> C:
        info = _algorithm_info(name, summary(cls.__doc__), paper=paper, needs=needs, family=family)
        cls.info = info  # type: ignore[attr-defined]
        algorithms.add(Plugin(cls, info))
        return cls

    return register


def register_reward(
    name: str,
    *,
    source: str,
    licence: str,
    range: tuple[float, float],
    differentiable: bool,
    truth: bool = False,
    domain: Literal["images", "points"] = "images",
    discrete: bool = False,
    requirements: Iterable[str] = (),
    reads_prompt: bool = True,
    needs_metadata: Iterable[str] = (),
    needs_reference: bool = False,
) -> Callable[[C], C]:
    """Class decorator for a reward; the docstring's first line becomes its summary. Arguments as in RewardInfo."""
    declared = {key: value for key, value in locals().items() if key != "name"}

    def register(cls: C) -> C:
        info = _reward_info(name, summary(cls.__doc__), **declared)
        cls.info = info  # type: ignore[attr-defined]
        rewards.add(Plugin(cls, info))
        return cls

    return register


def load_plugin_file(path: Path) -> None:
    """Import a Python file that registers algorithms or rewards.

    Raises UsageError when it is missing, broken, or registers nothing.
    """
    if not path.is_file():
        raise UsageError(f"plug-in file '{path}' does not exist")
    before = dict(algorithms.loaded), dict(rewards.loaded)
    # Two files of one name in different folders are two modules.
    place = hashlib.sha256(str(path.resolve()).encode(errors="surrogateescape")).hexdigest()[:8]
    name = f"{PLUGIN_FILE}{path.stem}_{place}".replace(".", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"plug-in file '{path}' is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"plug-in file '{path}' fails on import: {_import_fault(error, str(path))}") from error
    if before == (algorithms.loaded, rewards.loaded):
        raise UsageError(
            f"plug-in file '{path}' registers nothing; decorate a class with register_algorithm or register_reward"
        )


def _import_fault(error: BaseException, file: str | None) -> str:
    """What kept a module from being imported; a syntax error says itself where it is."""
    if isinstance(error, SystemExit):
        return f"it ends the program, sys.exit({error.code!r}){raised_at(error, file)}; take that out"
    return described(error) + ("" if isinstance(error, SyntaxError) else raised_at(error, file))
