"""Files: the old one or the new one at any moment, nobody else's, and readable as the umask says."""

from __future__ import annotations

import ast
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flowbench.errors import BusyError, UsageError
from flowbench.files import TEMPORARY, append_line, read_json_lines, write_atomically, write_folder
from flowbench.locks import locked

ROOT = Path(__file__).parent.parent
ROOMS = ("flowbench", "algorithms", "rewards")
# Models that others load, made file by file by their own libraries in a folder that is new.
OWN_FOLDERS = ("flowbench/services/parity.py",)


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def tensors(place: Path) -> None:
    save_file({"a": torch.ones(2)}, place)


@pytest.mark.parametrize("content", ["text", b"bytes", tensors])
def test_a_file_has_the_mode_of_the_umask_whoever_wrote_it(
    content: str | bytes | Callable[[Path], None], umask: None, tmp_path: Path
):
    path = tmp_path / "new" / "file.safetensors"
    write_atomically(path, content)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.stat().st_size > 0
    assert [p.name for p in path.parent.iterdir()] == ["file.safetensors"]


@pytest.mark.parametrize("kind", ["text", "function"])
def test_what_cannot_be_written_leaves_what_was_there(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def half(place: Path) -> None:
        place.write_text("ne", encoding="utf-8")
        raise OSError(28, "No space left on device")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    if kind == "text":
        monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new" if kind == "text" else half)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_devices_folders_and_links_of_others_are_refused_and_ones_own_links_stay(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((Path("/dev/null"), "device"), (tmp_path / "pipe", "device"), (tmp_path, "folder")):
        with pytest.raises(UsageError, match=f"is a {what}"):
            write_atomically(path, "text")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    write_atomically(link, "text")
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == "text"
    if os.geteuid() == 0:
        os.lchown(link, 12345, -1)
        with pytest.raises(UsageError, match="is somebody else's link"):
            write_atomically(link, "other")
        with pytest.raises(UsageError, match="is somebody else's link"):
            append_line(link, "other")
        assert target.read_text(encoding="utf-8") == "text"


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(umask: None, tmp_path: Path):
    folder = tmp_path / "folder"
    write_folder(folder, lambda place: (place / "one").write_text("1", encoding="utf-8"))

    def fail(place: Path) -> None:
        (place / "two").write_text("2", encoding="utf-8")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_folder(folder, fail)
    assert [path.name for path in folder.iterdir()] == ["one"]
    write_folder(folder, lambda place: tensors(place / "two"))
    assert [path.name for path in folder.iterdir()] == ["two"]
    assert stat.S_IMODE((folder / "two").stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [folder]


def test_a_line_takes_the_place_of_one_that_is_not_complete(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    append_line(log, json.dumps({"iteration": 1}))
    with log.open("a", encoding="utf-8") as file:
        file.write('{"iteration": 2, "text": "' + "x" * 9000)
    assert read_json_lines(log) == [{"iteration": 1}]
    append_line(log, json.dumps({"iteration": 2}))
    assert read_json_lines(log) == [{"iteration": 1}, {"iteration": 2}]
    log.write_text('{"iteration": 1}\nnone\n{"iteration": 2}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 2 of '.*log\.jsonl' is damaged"):
        read_json_lines(log)
    assert read_json_lines(tmp_path / "absent") == []


@pytest.mark.parametrize("beside", [False, True])
def test_a_lock_is_one_holders_at_a_time_and_its_folder_may_be_absent(beside: bool, tmp_path: Path):
    folder = tmp_path / "folder"
    with (
        locked(folder, "it", beside=beside),
        pytest.raises(BusyError, match="it is in use by process"),
        locked(folder, "it", beside=beside),
    ):
        pytest.fail("two at a time")
    assert folder.exists() is not beside
    with locked(folder, "it", beside=beside):
        pass


def writes(source: str) -> list[str]:
    """What in a source writes a file by itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("write_text", "write_bytes", "NamedTemporaryFile", "mkstemp"):
            found.append(name)
        modes = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
        if name == "open" and any(str(mode) in ("w", "wb", "a", "ab", "x", "xb", "w+b") for mode in modes):
            found.append(name)
        if name in ("replace", "rename") and isinstance(node.func, ast.Attribute):
            of = node.func.value
            if isinstance(of, ast.Name) and of.id == "os":
                found.append(f"os.{name}")
    return found


def test_there_is_one_way_to_write_a_file():
    # A checkpoint that cannot have two names loses one; a reward's package reads its settings from a file; pip's log is
    # read while it grows.
    known = {
        "flowbench/files.py": ["os.replace"] * 3,
        "flowbench/training/checkpoint.py": ["os.replace"],
        "rewards/imagereward_package.py": ["NamedTemporaryFile"],
        "flowbench/scoring/workers/environment.py": ["open"],
    }
    found = {}
    for path in (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))):
        name = path.relative_to(ROOT).as_posix()
        own = writes(path.read_text(encoding="utf-8"))
        if own and name not in OWN_FOLDERS:
            found[name] = own
    assert found == known
    assert TEMPORARY.startswith(".")
