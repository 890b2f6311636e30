"""The rooms of the house: imports point down, files stay short."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("flowbench", "algorithms", "rewards")
LONGEST = {"flowbench": 350, "algorithms": 150, "rewards": 180}


SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def only_code(folder: str, names: list[str]) -> list[str]:
    """What `copytree` shall leave out."""
    return [name for name in names if name == "__pycache__" or not (Path(folder, name).is_dir() or name[-3:] == ".py")]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The sources as pip lays them out: algorithms/ and rewards/ inside the package."""
    package = tmp_path / "flowbench"
    shutil.copytree(ROOT / "flowbench", package, ignore=only_code)
    for room in ROOMS[1:]:
        shutil.copytree(ROOT / room, package / room, ignore=only_code)
    return package


def lint_imports(package: Path) -> subprocess.CompletedProcess[str]:
    """import-linter's answer on a copy of the sources, by the contracts of pyproject.toml."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", code, "--config", ROOT / "pyproject.toml", "--no-cache"],
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_imports_point_down_the_list_of_rooms_and_make_no_circle(installed: Path):
    done = lint_imports(installed)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("training", "from flowbench.experiments.run import execute"),
        ("toolkit", "from flowbench.algorithms import acflow"),
        ("scoring", "import flowbench.cli"),
    ],
)
def test_an_import_that_points_up_is_found(room: str, line: str, installed: Path):
    (installed / room / "wrong.py").write_text(f"{line}\n", encoding="utf-8")
    done = lint_imports(installed)
    assert done.returncode == 1
    assert f"flowbench.{room}.wrong" in done.stdout


def test_a_room_that_the_list_does_not_have_is_found(installed: Path):
    (installed / "attic").mkdir()
    (installed / "attic" / "__init__.py").touch()
    done = lint_imports(installed)
    assert done.returncode == 1
    assert "attic" in done.stdout + done.stderr


def lines_to_read(path: Path) -> int:
    """Lines of a file; of an algorithm those beside its header, Config, defaults and search space."""
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    if path.parent.name != "algorithms":
        return lines
    tree = ast.parse(text)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    aside = [tree.body[0], *(node for c in classes for node in c.body if declared(node) in DECLARED)]
    return lines - sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in aside)


DECLARED = {"Config", "defaults", "search_space"}


def declared(node: ast.stmt) -> str | None:
    if isinstance(node, ast.ClassDef):
        return node.name
    return node.target.id if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else None


def test_source_files_are_short_enough_to_be_read_in_one_sitting():
    lengths = {path.relative_to(ROOT): lines_to_read(path) for path in SOURCES}
    assert {path.as_posix(): n for path, n in lengths.items() if n > LONGEST[path.parts[0]]} == {}


def test_no_module_imports_everything_of_another():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*"), path


def test_every_folder_of_code_is_a_package_that_is_installed():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in SOURCES:
        folder = path.parent.relative_to(ROOT)
        assert (ROOT / folder / "__init__.py").is_file()
        name = ".".join(folder.parts if folder.parts[0] == "flowbench" else ("flowbench", *folder.parts))
        assert f'"{name}"' in text, f"add {name} to [tool.setuptools] packages in pyproject.toml"
