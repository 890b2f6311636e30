"""Whether a result can be written where it is to go: asked before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path

from flowbench.errors import UsageError, shortened

LONGEST = 240  # bytes of a name: file systems take 255, and a temporary file beside it has a longer one


def check_file(option: str, path: Path) -> None:
    """Raise UsageError if no file can be written there; option: what named it, such as "--output".

    Folders that do not exist yet would be made.
    """
    _check_name(option, path)
    if path.is_dir():
        raise UsageError(f"{option} '{path}' is a folder; name a file in it")
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"{option} '{path}' cannot be written: permission denied; choose another place")
    check_folder(option, path.parent)


def check_folder(option: str, path: Path) -> None:
    """Raise UsageError if nothing can be put into that folder, or it cannot be made."""
    _check_name(option, path)
    nearest = next(place for place in (path, *path.parents, *path.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise UsageError(f"{option} '{path}' cannot be written: '{nearest}' is no folder; choose another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{option} '{path}' cannot be written: '{nearest}' forbids it; choose another place")


def _check_name(option: str, path: Path) -> None:
    """Raise UsageError for what no file system takes."""
    if "\0" in str(path):
        raise UsageError(f"{option} {shortened(str(path))} is no path; take out the null byte")
    if any(len(os.fsencode(part)) > LONGEST for part in path.parts):
        raise UsageError(f"{option} {shortened(str(path))} has a name of more than {LONGEST} bytes; shorten it")
