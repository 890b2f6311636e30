"""What `flowbench rewards install|list|remove` do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from flowbench.caches import home
from flowbench.errors import UsageError
from flowbench.locks import locked
from flowbench.registry import RewardInfo, rewards
from flowbench.scoring.workers.environment import Environment, State

Progress = Callable[[str, str], None]  # reward, what happens


@dataclass(frozen=True)
class Overlay:
    """A reward's environment as it is now."""

    info: RewardInfo
    state: State
    megabytes: float
    folder: Path


def overview() -> list[Overlay]:
    """All known rewards that live in an environment of their own."""
    return [_overlay(info) for info in _isolated()]


def install(names: Iterable[str], progress: Progress) -> list[Overlay]:
    """Create or complete the environments of rewards; those that are there stay as they are.

    Raises UsageError for an unknown reward or one that needs no environment, RunError when pip fails.
    """
    chosen = [_find(name) for name in names]
    for info in chosen:
        environment = Environment(info.requirements)
        if environment.state is not State.READY:
            environment.install(info.name, lambda note, name=info.name: progress(name, note))  # type: ignore[misc]
    return [_overlay(info) for info in chosen]


def remove(names: Iterable[str]) -> list[Overlay]:
    """Delete the environments of rewards; returns what they were.

    Raises UsageError for an unknown reward or one without an environment on this machine.
    """
    chosen = {Environment(info.requirements): _overlay(info) for info in map(_find, names)}
    for overlay in chosen.values():
        if overlay.state is State.ABSENT:
            raise UsageError(f"reward '{overlay.info.name}' has no environment on this machine; nothing to remove")
    for environment in chosen:
        environment.remove()
    return list(chosen.values())


def remove_all() -> list[Overlay]:
    """Delete all environments below `home()`, also those over main environments that are gone.

    Raises BusyError while another process installs one.
    """
    import shutil

    known, place = [overlay for overlay in overview() if overlay.state is not State.ABSENT], home() / "environments"
    with ExitStack() as held:
        for folder in sorted(place.iterdir()) if place.is_dir() else ():
            if folder.is_dir():
                held.enter_context(locked(folder, f"environment '{folder}'", beside=True))
        shutil.rmtree(place, ignore_errors=True)
    return known


def shared_with(name: str) -> list[str]:
    """Other rewards with the same environment."""
    requirements = rewards.describe(name).requirements
    return [i.name for i in _isolated() if sorted(i.requirements) == sorted(requirements) and i.name != name]


def _isolated() -> Iterator[RewardInfo]:
    for name in rewards.names():
        info = rewards.describe(name)
        if info.requirements:
            yield info


def _find(name: str) -> RewardInfo:
    """The reward of that name, or its variant "<name>-package" if it needs no environment itself."""
    info = rewards.describe(name)
    package = f"{name}-package"
    if not info.requirements and package in rewards.names():
        info = rewards.describe(package)
    if not info.requirements:
        raise UsageError(f"reward '{name}' needs no environment of its own; it runs in the main one")
    return info


def _overlay(info: RewardInfo) -> Overlay:
    environment = Environment(info.requirements)
    state = environment.state
    return Overlay(info, state, 0.0 if state is State.ABSENT else environment.megabytes, environment.folder)
