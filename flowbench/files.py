"""The one way to write a file: it is the old one or the new one at any moment, whatever happens on the way."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from flowbench.errors import UsageError

Content: TypeAlias = str | bytes | Callable[[Path], object]

TEMPORARY = ".flowbench-"  # what names of files begin with that are not complete yet


def write_atomically(path: Path, content: Content, *, durable: bool = True) -> None:
    """Write a file, and the folders above it: under a name that nobody can foresee, renamed when it is complete.

    content: text, written as UTF-8; bytes; or a function that writes the file that it is given the path of, whose name
    ends as `path` does. durable: whether it is on the disk, and not only on its way there, when this returns. The
    file's mode is as the umask says. A link of the user's own is followed, so that it stays a link.
    Raises UsageError for a device, a folder, or a link of somebody else; OSError when it cannot be written, and then
    what was there is there.
    """
    path = _destination(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path) as (temporary, descriptor):
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if callable(content):
            os.close(descriptor)
            content(temporary)
            os.chmod(temporary, mode)  # a library may have made another file of that name, with a mode of its own
            if durable:
                flush(temporary)
        else:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                if durable:
                    os.fsync(descriptor)
        os.replace(temporary, path)
    if durable:
        flush(path.parent)


def write_folder(folder: Path, content: Callable[[Path], object]) -> None:
    """Write a folder in place of what is there, by a function that fills the empty one that it is given.

    It gets its name when it is complete; what a killed process leaves is no folder of that name, or the old one.
    Raises UsageError where a file or a link has that name.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"'{folder}' is no folder, and is not replaced by one; move it away")
    new, old = (folder.with_name(f"{TEMPORARY}{secrets.token_hex(8)}") for _ in range(2))
    new.mkdir(parents=True)
    mask = 0o777 & ~stat.S_IMODE(new.stat().st_mode)  # as the umask has it
    try:
        content(new)
        for file in (path for path in new.rglob("*") if path.is_file() and not path.is_symlink()):
            os.chmod(file, 0o666 & ~mask)
            flush(file)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    flush(folder.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line to a log: all of it, or on an error nothing. What a killed process wrote of one is overwritten.

    It is on its way to the disk when this returns; `flush` waits until it is there. Raises UsageError for a device or a
    link of somebody else; OSError when it cannot be written.
    """
    path = _destination(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with os.fdopen(descriptor, "r+b") as file:
        end = _whole_lines(file)
        try:
            file.seek(end)
            file.write(line.encode() + b"\n")
            file.truncate()
            file.flush()
        except BaseException:
            with suppress(OSError):
                os.ftruncate(descriptor, end)
            raise


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log, one a line; a last line that is not complete is none of them. None where there is no file.

    Raises UsageError, with the line's number, for any other line that is no JSON object.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError:  # of UTF-8 too
            content = None
        if isinstance(content, dict):
            found.append(content)
        elif number < len(lines):
            raise UsageError(f"line {number} of '{path}' is damaged; the file is not used")
    return found


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed have left of files in a folder; nobody may be writing there."""
    for path in folder.glob(f"{TEMPORARY}*") if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have a file's content, or a folder's names where the system knows how, on the disk; nothing where there is none.

    Raises OSError for a file whose content does not get there.
    """
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        if not folder:
            raise
    finally:
        os.close(descriptor)


def _destination(path: Path) -> Path:
    """Where the file itself lies or will lie. Raises UsageError for what must not be written to."""
    try:
        link = path.lstat()
    except FileNotFoundError:
        return path
    if stat.S_ISLNK(link.st_mode):
        if hasattr(os, "geteuid") and link.st_uid != os.geteuid():
            raise UsageError(f"'{path}' is somebody else's link, and is not written to; use another name")
        path = path.resolve()
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder; name a file")
    if path.exists() and not path.is_file():
        raise UsageError(f"'{path}' is a device and no file, and is not written to; use another name")
    return path


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, int]]:
    """A new file beside another, and its descriptor; within it, it may get another name, and after it it is gone."""
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}{path.suffix}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        yield temporary, descriptor
    finally:
        temporary.unlink(missing_ok=True)


def _whole_lines(file: Any) -> int:
    """Where the last complete line of a file ends."""
    end: int = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0
