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


@pytest.mark.parametrize("document", [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))], ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
