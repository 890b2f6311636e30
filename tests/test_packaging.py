"""What is published: the wheel, the source distribution, and what both say of themselves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import flowbench

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = (".ci", "algorithms", "docs", "flowbench", "leaderboard", "rewards", "tests")


def build(kind: str, source: Path, output: Path) -> Path:
    """A distribution made by the build backend alone, without a network."""
    code = f"import sys; from setuptools import build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, output], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "absent from the `packages` configuration" not in done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of this tree, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "venv", "work")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder / "tree")
    with tarfile.open(build("sdist", folder / "tree", folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"flowbench-{flowbench.__version__}"


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the source distribution, so that nothing comes from this tree."""
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True, capture_output=True)
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([python, *arguments], cwd=folder, capture_output=True, text=True, env=environment)


def files_below(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix() for path in found}


def test_the_source_distribution_has_the_tests_and_all_that_they_read(unpacked: Path):
    for folder in FOLDERS[1:]:
        assert files_below(unpacked / folder) == files_below(ROOT / folder)
    for name in (".ci/run", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "mkdocs.yml"):
        assert (unpacked / name).is_file(), name


def test_tests_run_from_the_source_distribution(unpacked: Path, installed: Path):
    done = run(installed, unpacked, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", "tests/test_prompts.py")
    assert done.returncode == 0, done.stdout
    assert "100%" in done.stdout


def test_the_wheel_has_every_module_and_every_file_of_the_package(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"flowbench/{name}" for name in files_below(ROOT / "flowbench")}
    for folder in ("algorithms", "rewards"):
        expected |= {f"flowbench/{folder}/{name}" for name in files_below(ROOT / folder)}
    assert names == expected
    assert "flowbench/py.typed" in names


@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_the_installed_wheel_works_in_a_checkout_and_outside(place: str, installed: Path, tmp_path: Path):
    folder = ROOT if place == "checkout" else tmp_path
    done = run(installed, folder, "-m", "flowbench", "list")
    assert done.returncode == 0, done.stderr
    assert "acflow" in done.stdout
    code = "import flowbench.rewards.jpeg, flowbench; print(flowbench.__file__)"
    done = run(installed, folder, "-c", code)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(ROOT) == (place == "checkout")


def test_the_metadata_names_authors_links_and_tried_versions(wheel: Path):
    text = zipfile.ZipFile(wheel).read(f"flowbench-{flowbench.__version__}.dist-info/METADATA").decode()
    for line in ("Author: the flowbench authors", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"):
        assert line in text.splitlines()
    assert set(re.findall(r"^Project-URL: (\w+), https://", text, re.MULTILINE)) == {
        "Homepage", "Documentation", "Repository", "Changelog",
    }  # fmt: skip
    assert re.findall(r"Python :: (3\.\d+)", text) == ["3.11", "3.12", "3.13"]


def test_one_version_stands_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["project"]["version"] == flowbench.__version__ == citation["version"]
    assert f"## [{flowbench.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_citation_file_has_what_the_format_requires_and_names_the_project_as_pyproject_does():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert all(isinstance(citation[key], str) and citation[key] for key in ("message", "title", "abstract"))
    assert [author["name"] for author in citation["authors"]] == [a["name"] for a in PROJECT["project"]["authors"]]
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["repository-code"] == PROJECT["project"]["urls"]["Repository"]


def test_what_pypi_shows_has_no_relative_link():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"^\[[^]]+\]: (\S+)", text, re.MULTILINE)
    assert len(targets) > 20
    assert [target for target in targets if not target.startswith("https://")] == []
    assert not re.search(r"<(img|a) ", text)
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`|^\[[^]]+\]: .*$", "", text, flags=re.DOTALL | re.MULTILINE)
    used = set(re.findall(r"\]\[([^]]+)\]", prose)) | set(
        re.findall(r"(?<![\]\w])\[([A-Za-z][\w./-]*)\](?![\[(])", prose)
    )
    assert used == set(re.findall(r"^\[([^]]+)\]: ", text, re.MULTILINE))


def test_nothing_generated_is_under_version_control():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    generated = re.compile(r"__pycache__|\.py[cod]$|\.egg-info|^(build|dist|runs|\.cache)/|\.tmp$")
    assert [name for name in listed if generated.search(name)] == []
