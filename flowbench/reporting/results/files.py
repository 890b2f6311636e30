"""Where published records lie, and that none of them vanishes or changes.

v1/<workload>/base-<digest>.json, v1/<workload>/<algorithm>/<config hash>-s<seed>.json
v1/ablations/<model>-<reward>/<algorithm>/<config hash>-s<seed>.json
v1/MANIFEST     the SHA-256 of each, as `sha256sum --check` reads it
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flowbench.errors import UsageError
from flowbench.escape import plain
from flowbench.files import write_atomically
from flowbench.names import path_name
from flowbench.published import LARGEST, MANIFEST, as_text, shortened
from flowbench.record import Record, load_record

VERSION = "v1"
ABLATIONS = "ablations"


def place(record: Record) -> Path:
    """Where a record is published, below the folder of results; names of records never lead out of it."""
    where = Path(path_name(record.workload)) if record.workload else None
    where = where or Path(ABLATIONS, path_name(f"{record.model}-{record.reward}"))
    name = f"{path_name(record.config_hash)}-s{record.seed}.json"
    return Path(VERSION, where, path_name(record.algorithm), name)


@dataclass(frozen=True)
class Published:
    """The files of some records by their paths below the folder of results; too_large: paths of records above 25 kB."""

    files: Mapping[Path, str]
    too_large: tuple[Path, ...]


def published(records: Iterable[Record]) -> Published:
    """Records as they are published, and the base scores that they share."""
    files: dict[Path, str] = {}
    too_large = []
    for record in records:
        document, base = shortened(record.model_dump(mode="json"))
        path = place(record)
        files[path] = as_text(document)
        if base is not None:
            files[path.parent.parent / base.file] = base.text
        if len(files[path].encode()) > LARGEST:
            too_large.append(path)
    return Published(files, tuple(too_large))


def write(root: Path, files: Mapping[Path, str]) -> list[Path]:
    """Add files to the folder of results and to its manifest; returns those that were not there.

    Raises UsageError where a file is there with another content: what was published is never replaced.
    """
    new = {path: text for path, text in files.items() if not (root / path).exists()}
    for path in files.keys() - new.keys():
        if (root / path).read_text(encoding="utf-8") != files[path]:
            raise UsageError(f"'{root / path}' is published with another content, and is never replaced")
    for path, text in new.items():
        write_atomically(root / path, text)
    listed = read_manifest(root)
    listed |= {path.relative_to(VERSION).as_posix(): _digest(text.encode()) for path, text in files.items()}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(listed.items()))
    write_atomically(root / VERSION / MANIFEST, lines)
    return sorted(new)


def read_manifest(root: Path) -> dict[str, str]:
    """The digests of published files by their paths below v1.

    Raises UsageError for a file that is no manifest.
    """
    path = root / VERSION / MANIFEST
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    listed = {name: digest for digest, sep, name in (line.partition("  ") for line in lines) if sep}
    if len(listed) != len(lines):
        raise UsageError(f"'{path}' is no manifest of results; restore it")
    return listed


def faults_of(root: Path) -> list[str]:
    """A line for each file that vanished, was changed, is not listed, is too large, misplaced, or no record."""
    listed, top = read_manifest(root), root / VERSION
    there = {path.relative_to(top).as_posix(): path for path in sorted(top.rglob("*.json")) if path.is_file()}
    faults = [f"{plain(name)}: was published and is gone; restore it" for name in sorted(listed.keys() - there.keys())]
    for name, path in there.items():
        content = path.read_bytes()
        if name not in listed:
            faults.append(f"{plain(name)}: is not in {MANIFEST}; add results with 'flowbench submit'")
        elif _digest(content) != listed[name]:
            faults.append(f"{plain(name)}: was changed after it was published; restore it")
        elif not path.name.startswith("base-"):
            faults += [f"{plain(name)}: {fault}" for fault in _record_faults(root, path, content)]
    return faults


def vanished_since(root: Path, ref: str) -> list[str]:
    """A line for each file that was published at a commit, and is gone or another now; the manifest may grow.

    Raises UsageError outside a git checkout, or for an unknown commit.
    """
    command = ["git", "diff", "--no-renames", "--name-status", "--diff-filter=DMT", "-z", ref, "--", VERSION]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=60)
    except OSError as error:
        raise UsageError(f"what was published at '{ref}' cannot be told: {error.strerror or error}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["git fails"])[0]
        raise UsageError(f"what was published at '{plain(ref)}' cannot be told: {plain(reason)}")
    words = done.stdout.split("\0")[:-1]
    changed = zip(words[::2], words[1::2], strict=True)
    said = {"D": "was published and is gone; restore it"}
    return [
        f"{plain(name)}: {said.get(status, 'was changed after it was published; restore it')}"
        for status, name in changed
        if not name.endswith(f"/{MANIFEST}")
    ]


def _record_faults(root: Path, path: Path, content: bytes) -> list[str]:
    try:
        record = load_record(path)
    except UsageError as error:
        return [plain(str(error))]
    found = []
    if root / place(record) != path:
        found.append(f"says that it belongs to '{plain(str(place(record)))}'")
    if len(content) > LARGEST:
        found.append(f"is larger than {LARGEST // 1000} kB")
    return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
