"""Locks: one process at a time works on a run folder, an environment or a search's log.

The system holds a lock for as long as its process lives, however that ends. Beside it a small file says whose it is.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from flowbench.errors import BusyError
from flowbench.files import write_atomically

LOCK, HOLDER = ".lock", ".lock.json"  # in a folder, or behind a name
PATIENCE = 1.0  # seconds; who only asks for the holder has the lock for a moment


@dataclass(frozen=True)
class Holder:
    """The process that has a lock; pid 0 is one that did not say who it is."""

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "another process"


@contextmanager
def locked(folder: Path, what: str = "", *, beside: bool = False) -> Iterator[None]:
    """Within it, no other process gets the lock of this folder.

    what: how the message names it; beside: the lock's files lie beside the folder, which may come and go.
    Raises BusyError in one line when another process has it.
    """
    from filelock import FileLock, Timeout

    lock, said = _files(folder, beside)
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(str(lock))
    try:
        held.acquire(timeout=PATIENCE, poll_interval=0.1)
    except Timeout:
        raise BusyError(
            f"{what or folder} is in use by {_read(said)}; wait for its end, or stop it, and try again"
        ) from None
    try:
        write_atomically(said, json.dumps(asdict(Holder(os.getpid(), socket.gethostname()))) + "\n", durable=False)
        yield
    finally:
        with suppress(OSError):
            said.unlink(missing_ok=True)
        held.release()


def holder(folder: Path, *, beside: bool = False) -> Holder | None:
    """The process that has the lock of a folder at the moment, or None."""
    from filelock import FileLock, Timeout

    lock, said = _files(folder, beside)
    if not lock.is_file():
        return None
    asked = FileLock(str(lock))
    try:
        asked.acquire(timeout=0)
    except Timeout:
        return _read(said)
    except OSError:
        return None  # a folder that one may only read
    asked.release()
    return None


def _files(folder: Path, beside: bool) -> tuple[Path, Path]:
    if beside:
        return folder.with_name(folder.name + LOCK), folder.with_name(folder.name + HOLDER)
    return folder / LOCK, folder / HOLDER


def _read(said: Path) -> Holder:
    try:
        content = json.loads(said.read_bytes())
        return Holder(int(content["pid"]), str(content["host"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Holder(0, "")
