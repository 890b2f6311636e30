"""Requests that make no sense are refused in a line with culprit and remedy, before anything is loaded or written."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowbench.errors import UsageError
from flowbench.experiments.sampling import _file_for
from flowbench.models.presets import load_preset
from flowbench.outputs import check_file, check_folder

Main = Callable[..., int]
LONG = "9" * 24
RUN = ("run", "nft", "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ((*RUN, "--set", "=3"), "has no key before its '='"),
        ((*RUN, "--set", "training.images=[1"), "cannot be read as a value"),
        ((*RUN, "--set", "training.images=!!python/object:x {}"), "cannot be read as a value"),
        ((*RUN, "--set", "training.images=2001-99-99"), "cannot be read as a value"),
        ((*RUN, "--set", f"training.images={'[' * 2000}"), "cannot be read as a value"),
        ((*RUN, "--set", "training.learning_rate=inf"), "setting 'training.learning_rate' = inf"),
        ((*RUN, "--set", "training.learning_rate=.nan"), "setting 'training.learning_rate' = nan"),
        ((*RUN, "--set", "algorithm.beta=.inf"), "setting 'algorithm.beta' = inf"),
        ((*RUN, "--set", "training.num_steps=-1"), "setting 'training.num_steps' = -1"),
        ((*RUN, "--set", "training.adam_betas=[0.9, 1.0]"), "setting 'training.adam_betas.1' = 1.0"),
        ((*RUN, "--set", "training.images_per_prompt=1"), "nft compares the images of a prompt"),
        (("run", "raft", "--dry-run", "--set", "training.images_per_prompt=1"), "raft compares the images"),
        (("run", "acflow", "--dry-run", "--set", "algorithm.warmup=5000"), "warm-up of 5000 iterations"),
        ((*RUN, "--set", "evaluation.splits=[]", "--set", "evaluation.points=0"), "evaluation.splits is empty"),
        ((*RUN, "--set", "evaluation.splits=[../../x]"), "must not be empty and not begin with a dot"),
        ((*RUN, "--set", "evaluation.splits=[a/b]"), "no slash"),
        ((*RUN, "--set", "evaluation.splits=[test, test]"), "'test' stands twice"),
        ((*RUN, "--set", f"evaluation.seed={LONG}"), "setting 'evaluation.seed'"),
        ((*RUN, "--seed", LONG), "'--seed'"),
        ((*RUN, "--config", "a.yaml", "--config", "b.yaml"), "--config is given 2 times"),
        ((*RUN, "--config", "other.yaml"), "'other.yaml' is of algorithm 'acflow'"),
        ((*RUN, "--config", "long.yaml"), "setting 'seed' ="),
        ((*RUN, "--config", "binary.yaml"), "configuration file 'binary.yaml' line 1 is not UTF-8 text"),
        ((*RUN, "--config", "empty/"), "configuration file 'empty' does not exist"),
        ((*RUN, "--output", "file/runs"), "'file' is no folder"),
        (("run", "nft", "--dry-run", "--memory", "--json", "empty"), "--json 'empty' is a folder"),
        ((*RUN, "--model", "climbs.yaml"), "model file 'climbs.yaml' is not a preset: 'name'"),
        ((*RUN, "--model", "steps.yaml"), "is not a preset: 'num_steps'"),
        ((*RUN, "--model", "binary.yaml"), "model file 'binary.yaml' is not a preset"),
        ((*RUN, "--model", "list.yaml"), "it is no mapping"),
        ((*RUN, "--reward", "http://me:secret@host"), "an address must have no user"),
        (("compare", "nft", "raft", "--rewards", "http://me:secret@host"), "address must have no user"),
        (("compare", "nft", "raft", "--seeds", LONG), "'--seeds'"),
        (("evaluate", "empty", "--output", "empty"), "--output 'empty' is a folder"),
        (("evaluate", "broken"), "'broken/config.yaml' is no configuration of a run"),
        (("sample", "broken", "a red circle"), "'broken/config.yaml' is no configuration of a run"),
        (("sample", "empty", "x", "--output", "x.jpg"), "is neither a PNG file nor a folder"),
        (("leaderboard", "list.yaml"), "'list.yaml' is not a flowbench record"),
        (("leaderboard", "--output", "file/x.md"), "'file' is no folder"),
        (("page", "--output", "empty"), "--output 'empty' is a folder"),
        (("probe", "nft", "--plot", "empty"), "--plot 'empty' is a folder"),
        (("ablate", "nft", "--plot", "empty"), "--plot 'empty' is a folder"),
        (("ablate", "nft", "--seeds", LONG), "'--seeds'"),
        (("bench", "--json", "empty"), "--json 'empty' is a folder"),
        (("tune", "nft", "--runs", "file/x"), "'file' is no folder"),
        (("tune", "nft", "--seed", LONG), "'--seed'"),
        (("testbed", "show", "--output", "empty"), "--output 'empty' is a folder"),
        (("testbed", "build", "--work", "file/x"), "'file' is no folder"),
        (("rewards", "parity", "hpsv2", "--output", "empty"), "--output 'empty' is a folder"),
        (("rewards", "serve", "jpeg", "--host", ""), "an empty word stands behind '--host'"),
        (("suite", "run", "list.yaml"), "list.yaml"),
    ],
)
def test_a_request_without_sense_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...],
    answer: str,
    flowbench_main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "file": "",
        "a.yaml": "training: {images: 64}\n",
        "b.yaml": "training: {images: 64}\n",
        "other.yaml": "algorithm: acflow\nhyperparameters: {}\n",
        "long.yaml": f"seed: {LONG}\n",
        "list.yaml": "[1, 2]\n",
        "broken/config.yaml": "algorithm: [1]\n",
        "empty/.keep": "",
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    content = load_preset("mini-sd3").model_dump(mode="json")
    Path("climbs.yaml").write_text(yaml.safe_dump({**content, "name": "../../x"}))
    Path("steps.yaml").write_text(yaml.safe_dump({**content, "num_steps": -1}))
    before = sorted(tmp_path.rglob("*"))
    assert flowbench_main(*arguments) == 2
    said = capsys.readouterr().err
    assert answer.replace("an address", "a reward's address") in said
    assert said.startswith("flowbench: ")
    assert len(said.splitlines()) == 1
    assert len(said) < 500
    assert "Error" not in said
    assert "secret" not in said
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_written_is_said_before(tmp_path: Path):
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file" / "x", tmp_path / ("n" * 300), Path("a\0b")):
        with pytest.raises(UsageError, match="--output"):
            check_folder("--output", bad)
    with pytest.raises(UsageError, match="is a folder"):
        check_file("--output", tmp_path)
    check_file("--output", tmp_path / "new" / "deeper" / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_samples_go_into_a_folder_or_a_png(tmp_path: Path):
    assert _file_for("a cup", 3, tmp_path / "x.png") == tmp_path / "x.png"
    for folder in (tmp_path, tmp_path / "new"):
        found = _file_for("a cup", 3, folder)
        assert found.parent == folder
        assert found.name.startswith("a-cup-")
        assert found.name.endswith("-3.png")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "x\x1b.json"), "'x<U+001B>.json': permission denied"),
        (MemoryError(), "out of memory"),
        (SystemExit(0), "ended the program, sys.exit(0)"),
    ],
)
def test_what_nobody_foresaw_is_said_without_a_bare_name(
    error: BaseException,
    said: str,
    flowbench_main: Main,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("flowbench.cli.display.listing.listing", fail)
    assert flowbench_main("list", "models") == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert not any(name in shown for name in dir(builtins) if name.endswith("Error"))
