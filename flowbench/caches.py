"""What can be computed again and is kept on disk between runs: where it lies, and files that are read only if whole."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flowbench.errors import UsageError
from flowbench.files import write_atomically

if TYPE_CHECKING:
    import torch

OFF = "off"  # of FLOWBENCH_CACHE

logger = logging.getLogger("flowbench")


def home() -> Path:
    """FLOWBENCH_HOME, else flowbench's folder in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FLOWBENCH_HOME") or cache / "flowbench").expanduser()


class Cache:
    """Named tensors by identity, one safetensors file each, below FLOWBENCH_CACHE or else `home()`.

    An identity is a text, such as JSON, of all that decides the tensors; equal texts are equal tensors. With
    FLOWBENCH_CACHE=off nothing is read and nothing written. Files may be deleted at any time.
    """

    def __init__(self, name: str) -> None:
        place = os.environ.get("FLOWBENCH_CACHE") or str(home())
        self.folder = None if place == OFF else Path(place).expanduser() / name

    def read(self, identity: str) -> dict[str, torch.Tensor] | None:
        """The tensors of that identity on the CPU; None if there are none, or their file is damaged or another's."""
        file = self._file(identity)
        if file is None or not file.is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), framework="pt") as stored:
                said = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            logger.warning("'%s' is damaged and not used: %s", file, str(error).splitlines()[0])
            return None
        if said.get("identity") != identity or said.get("sha256") != digest(tensors):
            logger.warning("'%s' holds something else than its name says, and is not used", file)
            return None
        return tensors

    def write(self, identity: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors, in place of a file that is there; one that cannot be written is said, and no error."""
        file = self._file(identity)
        if file is None:
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        content = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        said = {"identity": identity, "sha256": digest(content)}
        try:
            write_atomically(file, lambda place: save_file(content, place, metadata=said))
        except (OSError, SafetensorError, UsageError) as error:
            logger.warning("'%s' cannot be written, so it will be computed again: %s", file, error)

    def _file(self, identity: str) -> Path | None:
        name = hashlib.sha256(identity.encode()).hexdigest()[:24]
        return None if self.folder is None else self.folder / f"{name}.safetensors"


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and values."""
    import torch

    whole = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        whole.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        whole.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def file_identity(folder: Path, *parts: str) -> str | None:
    """What tells the files below `parts` of a folder from others, without reading them; all files if none is named.

    Names, sizes and times of change, or for a link, as the hub's cache has them, what it points to. None if there are
    no such files.
    """
    places = [folder / part for part in parts] or [folder]
    files = sorted(file for place in places for file in place.rglob("*") if file.is_file())
    facts = [(str(file.relative_to(folder)), *_facts(file)) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest() if facts else None


def _facts(file: Path) -> tuple[int, str]:
    state = file.stat()
    return state.st_size, file.resolve().name if file.is_symlink() else str(state.st_mtime_ns)
