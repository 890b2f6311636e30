"""Whether a result can be written where it is to go: asked before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path

from flowbench.errors import UsageError, shortened


def check_file(option: str, path: Path) -> None:
    """Raise UsageError if no file can be written there; option: what named it, such as "--output".

    Folders that do not exist yet would be made.
    """
    if path.is_dir():
        raise UsageError(f"{option} '{path}' is a folder; name a file in it")
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"{option} '{path}' cannot be written: permission denied; choose another place")
    check_folder(option, path.parent)


def check_folder(option: str, path: Path) -> None:
    """Raise UsageError if nothing can be put into that folder, or it cannot be made."""
    if "\0" in str(path):
        raise UsageError(f"{option} {shortened(str(path))} is no path; take out the null byte")
    nearest = next(place for place in (path, *path.parents, *path.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise UsageError(f"{option} '{path}' cannot be written: '{nearest}' is no folder; choose another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{option} '{path}' cannot be written: '{nearest}' forbids it; choose another place")
    if any(len(part.encode(errors="surrogateescape")) > _longest(nearest) for part in path.parts):
        raise UsageError(f"{option} '{str(path)[:80]} ...' has a name that is too long for the file system; shorten it")


def _longest(folder: Path) -> int:
    return os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
