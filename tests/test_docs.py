"""What the documentation shows, runs; what it lists, exists."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from flowbench.registry import algorithms

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def first_block(document: Path, language: str) -> str:
    match = re.search(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert match, f"{document} has no {language} block"
    return match.group(1)


def run_example(
    main: Callable[..., int], settings: list[str], preset_file: str, plugin: Path, folder: Path, *arguments: str
) -> dict:
    """The record of a tiny run with a plug-in file."""
    where = ["--model", preset_file, "--device", "cpu", "--output", str(folder)]
    assert main("run", *arguments, "--plugin", str(plugin), *where, *settings) == 0
    (path,) = folder.rglob("record.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_example_algorithm_runs_as_a_plugin(
    flowbench_main: Callable[..., int], settings: Callable[..., list[str]], preset_file: str, tmp_path: Path
) -> None:
    code = first_block(DOCS / "write-an-algorithm.md", "python")
    assert len(code.splitlines()) <= 40
    plugin = tmp_path / "better_half.py"
    plugin.write_text(code, encoding="utf-8")
    arguments = ["better-half", "--reward", "jpeg", "--set", "algorithm.alpha=0.5"]
    record = run_example(flowbench_main, settings(), preset_file, plugin, tmp_path / "runs", *arguments)
    assert record["algorithm"] == "better-half"
    assert record["config"]["hyperparameters"] == {"alpha": 0.5}


def test_the_example_reward_runs_as_a_plugin(
    flowbench_main: Callable[..., int], settings: Callable[..., list[str]], preset_file: str, tmp_path: Path
) -> None:
    plugin = tmp_path / "redness.py"
    plugin.write_text(first_block(DOCS / "write-a-reward.md", "python"), encoding="utf-8")
    arguments = ["orw-cfm-w2", "--reward", "redness"]
    record = run_example(flowbench_main, settings(), preset_file, plugin, tmp_path / "runs", *arguments)
    assert "redness/test" in record["scores"]


def built_in_algorithms() -> list[str]:
    return sorted(path.stem.replace("_", "-") for path in (ROOT / "algorithms").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", built_in_algorithms())
def test_every_algorithm_has_a_page_with_all_its_hyperparameters_and_their_defaults(name: str) -> None:
    page = (DOCS / "algorithms" / f"{name}.md").read_text(encoding="utf-8")
    config = algorithms.get(name).cls.Config()
    said = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page, re.MULTILINE))
    assert set(said) == set(type(config).model_fields)
    for field, value in config.model_dump().items():
        spelled = said[field]
        if isinstance(value, bool) or value is None:
            assert spelled == json.dumps(value), field
        elif isinstance(value, float | int):
            assert float(spelled) == value, field
        else:
            assert spelled == value, field


def test_ci_runs_the_readmes_test_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"
    assert command in readme
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace('"', "").replace("$venv", ".venv")
    lines = [line.strip() for line in script.splitlines()]
    steps = [lines.index(step) for step in command.split(" && ")]
    assert steps == sorted(steps)


DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "leaderboard").glob("*.md"))]
# Where readers outside the repository find its files.
REPOSITORY = re.compile(
    r"https://(?:github|raw\.githubusercontent)\.com/flowbench/flowbench/(?:(?:blob|tree)/)?main/(.+)"
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) + re.findall(r"^\[[^]]+\]: ([^#\s]+)", text, re.MULTILINE)
    for target in links:
        if match := REPOSITORY.fullmatch(target):
            assert (ROOT / match[1]).exists(), target
        elif not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_files_and_modules_that_documents_and_sources_name_exist() -> None:
    sources = [path for folder in ("flowbench", "algorithms", "rewards") for path in (ROOT / folder).rglob("*.py")]
    presets = (ROOT / "flowbench").rglob("*.yaml")
    cards = (ROOT / "flowbench" / "testbeds").rglob("README.md")
    stale = []
    for path in [*(d for d in DOCUMENTS if d.name != "CHANGELOG.md"), *sources, *presets, *cards]:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"(?<![\w/.-])((?:flowbench|docs|tests|leaderboard)/[\w/.-]+\.\w+)", text)
        stale += [f"{path.name}: {name}" for name in named if "NAME" not in name and not (ROOT / name).exists()]
        modules = re.findall(r"(?<![\w\"./])flowbench((?:\.[a-z_][a-z_0-9]*)+)", text)
        stale += [f"{path.name}: flowbench{name}" for name in modules if not is_module(name)]
    assert stale == []


def is_module(name: str) -> bool:
    """Whether ".a.b.c" is a folder of the package, begins with a module of it, or is a name that a folder offers."""
    first, *rest = name.strip(".").split(".")
    place = ROOT if first in ("algorithms", "rewards") else ROOT / "flowbench"
    for part in (first, *rest):
        if (place / f"{part}.py").is_file():
            return True
        if not (place / part).is_dir():
            return re.search(rf"\b{part}\b", (place / "__init__.py").read_text(encoding="utf-8")) is not None
        place = place / part
    return True


def test_every_page_is_in_the_sites_navigation() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in sorted(DOCS.rglob("*.md")) if f": {page.relative_to(DOCS).as_posix()}\n" not in site] == []
