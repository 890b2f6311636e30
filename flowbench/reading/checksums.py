"""SHA-256 of files: to tell a file from another, and one that flowbench ships from a damaged one."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from flowbench.caches import Cache
from flowbench.errors import UsageError
from flowbench.files import write_atomically

SUMS = "SHA256SUMS"
LARGE = 2**28  # bytes
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LINE = re.compile(rb"[0-9a-f]{64}  [ -~\x80-\xff]+")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, computed once while its size and time of change stay as they are.

    The hub's cache names large files by their SHA-256, and links to them; that name is taken at its word.
    Raises OSError for a file that cannot be read.
    """
    target = path.resolve()
    if path.is_symlink() and _DIGEST.fullmatch(target.name):
        return target.name
    state = target.stat()
    return _sha256(target, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, size: int, changed: int) -> str:
    kept = _kept(path, size, changed)
    if kept is not None and kept.is_file() and _DIGEST.fullmatch(known := kept.read_text(encoding="utf-8")):
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if kept is not None:
        with contextlib.suppress(OSError):  # then it is computed again next time
            write_atomically(kept, digest, durable=False)
    return digest


def _kept(path: Path, size: int, changed: int) -> Path | None:
    """Where the hash of a large file is kept between runs: to read tens of gigabytes takes a while."""
    folder = Cache("sums").folder
    if folder is None or size < LARGE:
        return None
    return folder / hashlib.sha256(json.dumps([str(path), size, changed]).encode()).hexdigest()[:24]


def content_sha256(files: Iterable[Path], folder: Path) -> str:
    """SHA-256 over the names, relative to a folder, and the contents of files in it, wherever the folder lies.

    Raises OSError for a file that cannot be read.
    """
    content = {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_sums(path: Path) -> dict[str, str]:
    """The checksums of a file as sha256sum writes it, by the files' names; none if there is no such file."""
    if not path.is_file():
        return {}
    pairs = (line.split("  ", 1) for line in path.read_text("utf-8", "replace").splitlines() if "  " in line)
    return {name: digest for digest, name in pairs}


def check_listed(file: Path, sums: Path) -> None:
    """Raise UsageError for a file that is not as the checksums say which lie in its folder or in one above it.

    Of a file that they do not have nothing is known; neither is where there are none.
    """
    if not sums.is_file():
        return
    lines = sums.read_bytes().splitlines()
    if not all(_LINE.fullmatch(line) for line in lines):
        raise UsageError(f"'{sums}' is damaged; restore it")
    said = read_sums(sums).get(file.relative_to(sums.parent).as_posix())
    if said is not None and file.is_file() and said != file_sha256(file):
        raise UsageError(f"'{file}' is not as it was written (its checksum differs); restore it")


def write_sums(path: Path, files: Iterable[Path]) -> None:
    """Write the checksums of files below the folder of `path`, as sha256sum reads them."""
    named = sorted((file.relative_to(path.parent).as_posix(), file) for file in files)
    write_atomically(path, "".join(f"{file_sha256(file)}  {name}\n" for name, file in named))
