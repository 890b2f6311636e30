"""The Python API: same names, defaults and results as the command line, and cheap to import."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import flowbench
from flowbench.cli import main as cli
from flowbench.cli import tune as cli_tune
from flowbench.errors import UsageError
from flowbench.experiments.reevaluate import Evaluation
from flowbench.record import Record

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PLANE = {"model": "gaussian", "reward": "linear", "images": 256, "device": "cpu"}
FEW = {"evaluation.prompts": 2, "evaluation.images_per_prompt": 2, "algorithm.warmup": 0}
OWN = {"settings", "track", "plugin", "plugins", "dry_run", "listener", "progress"}  # spelled as each side is used
OWN |= {"slurm"}
OWN |= {"memory", "tflops", "json_"}  # of a dry run, which only the command has


def defaults(function: Callable[..., object]) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in OWN}


def test_importing_flowbench_imports_nothing_heavy():
    code = "import sys, flowbench; print(sorted({'torch', 'pydantic', 'numpy', 'yaml', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_listed():
    for name in flowbench.__all__:
        assert callable(getattr(flowbench, name))
        assert name in dir(flowbench)
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        _ = flowbench.rum


@pytest.mark.parametrize("name", ["run", "evaluate", "tune"])
def test_a_function_has_the_options_and_the_defaults_of_its_command(name: str):
    command = defaults(cli_tune.tune if name == "tune" else getattr(cli, name))
    function = defaults(getattr(flowbench, name))
    if "config" in command:  # typer takes several, so that a second one can be refused
        command["config"] = command["config"] or None
    assert function == command
    assert next(iter(function)) == next(iter(command))


def test_the_readmes_example_runs_and_gives_typed_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_registry: None
):
    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE))
    lines = [line for line in code.splitlines() if line.strip()]
    assert lines[0] == "import flowbench"
    assert len(lines) <= 6
    tiny = re.sub(r"images=\d+", "images=2560", code)
    assert tiny != code
    names: dict[str, object] = {}
    exec(compile(tiny, "README.md", "exec"), names)
    result = names["result"]
    assert isinstance(result, flowbench.RunResult)
    assert (result.folder / "DONE").exists()
    assert isinstance(result.record, Record)
    assert isinstance(names["scores"], Evaluation)
    assert names["records"] == [result.record]


def test_a_run_of_the_api_is_the_run_of_the_command_line(tmp_path: Path, flowbench_main: Callable[..., int]):
    result = flowbench.run("acflow", **PLANE, seed=3, settings=FEW, output=tmp_path / "api")
    words = result.record.command.split()
    assert words[:3] == ["flowbench", "run", "acflow"]
    words[words.index("--output") + 1] = str(tmp_path / "typed")
    assert flowbench_main(*words[1:]) == 0
    api, typed = flowbench.load_records(tmp_path / "api", tmp_path / "typed")
    assert api == result.record
    assert api.per_prompt == typed.per_prompt
    assert api.config == typed.config


def test_a_configuration_file_comes_before_defaults_and_arguments_before_it(tmp_path: Path):
    from flowbench.experiments.api import resolve

    file = tmp_path / "mine.yaml"
    file.write_text("reward: jpeg\nseed: 9\ntraining: {images: 64, learning_rate: 1e-3}\n", encoding="utf-8")
    config = resolve("raft", config=file, images=128, settings={"training.learning_rate": 2e-3})
    assert (config.reward, config.model, config.seed) == ("jpeg", "mini-sd3", 9)
    assert (config.training.images, config.training.learning_rate) == (128, 2e-3)
    assert resolve("raft", config=file, seed=0).seed == 0


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: flowbench.run("acflw"), "did you mean 'acflow'"),
        (lambda: flowbench.run("acflow", images=0), "training.images"),
        (lambda: flowbench.run("acflow", seed=-1), "seed"),
        (lambda: flowbench.run("acflow", plugins=["absent.py"]), "does not exist"),
        (lambda: flowbench.evaluate("absent"), "'absent' does not exist"),
        (lambda: flowbench.load_records("absent"), "'absent' does not exist"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call: Callable[[], object], complaint: str):
    with pytest.raises(UsageError, match=complaint) as raised:
        call()
    assert "\n" not in str(raised.value)
