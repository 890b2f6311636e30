"""`--prompts`, and run folders that keep what they were made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from small import SMALL

from flowbench.config import RunConfig, resolve_config
from flowbench.errors import UsageError
from flowbench.experiments.reevaluate import evaluate
from flowbench.experiments.run import execute
from flowbench.experiments.sampling import sample_side_by_side
from flowbench.models.policy import Policy
from flowbench.models.presets import FOLDER, load_preset
from flowbench.prompts import load_split
from flowbench.record import load_record
from flowbench.settings import read_config_file
from flowbench.testbeds.shapes.weights import weights_folder

LINES = [f"a {size} {color} circle" for size in ("small", "large") for color in ("red", "green", "blue", "yellow")]
SETTINGS = {**SMALL, "training.images": 16, "evaluation.prompts": 2}


def silent(done: int, total: int) -> None: ...


def settings(**changed: Any) -> dict[str, Any]:
    values = {**SETTINGS, **{key.replace("__", "."): value for key, value in changed.items()}}
    return {key: value for key, value in values.items() if value is not None}


def resolve(model: str, prompts: str | None = None, **changed: Any) -> RunConfig:
    return resolve_config("nft", "jpeg", model, overrides=settings(**changed), device="cpu", prompts=prompts)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text("".join(f"{line}\n" for line in LINES), encoding="utf-8")
    return path


def test_prompts_of_ones_own_enter_the_hash_by_content_and_not_by_path(
    lines: Path, preset_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    plain = resolve(preset_file)
    assert (plain.prompts, plain.prompts_hash) == (None, None)
    config = resolve(preset_file, str(lines), evaluation__splits=None)
    assert config.prompts == str(lines)
    assert config.evaluation.splits == ("test",)
    assert caplog.messages == [f"prompts '{lines}' have no split 'compositional'; evaluated on: test"]
    moved = shutil.copy(lines, tmp_path / "other.txt")
    assert resolve(preset_file, str(moved)).hash() == config.hash() != plain.hash()
    lines.write_text("".join(f"{line}\n" for line in LINES[:-1]), encoding="utf-8")
    assert resolve(preset_file, str(lines)).hash() != config.hash()
    lines.unlink()
    assert config.hash() == resolve(preset_file, str(moved)).hash()  # also when the file is gone


def test_the_models_own_prompts_by_name_make_no_other_run(preset_file: str):
    assert resolve(preset_file, "shapes") == resolve(preset_file)
    other = resolve(preset_file, "objects")
    assert (other.prompts, other.hash() != resolve(preset_file).hash()) == ("objects", True)


def test_splits_that_are_empty_or_the_same_are_refused_before_anything_is_loaded(preset_file: str, tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.txt").write_text("a red circle\na blue square\n", encoding="utf-8")
    (folder / "test.txt").write_text("a blue square\na red circle\na red circle\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"splits 'train' and 'test' of prompts '.*set' are the same prompts"):
        resolve(preset_file, str(folder), evaluation__splits=["test"])
    (folder / "test.txt").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"test\.txt line 1 holds no prompt"):
        resolve(preset_file, str(folder), evaluation__splits=["test"])
    (folder / "test.txt").write_text("a green cross\n", encoding="utf-8")
    (folder / "dev.txt").write_text("a green cross\n", encoding="utf-8")
    with pytest.raises(UsageError, match="splits 'test' and 'dev'"):
        resolve(preset_file, str(folder), evaluation__splits=["test"])
    with pytest.raises(UsageError, match="split 'test' stands twice"):
        resolve(preset_file, evaluation__splits=["test", "test"])


@pytest.mark.parametrize(("resolution", "side"), [(33, "height"), (36, "height"), ([32, 36], "width")])
def test_a_resolution_that_the_model_cannot_make_is_refused_before_anything_is_loaded(
    resolution: object, side: str, tmp_path: Path
):
    content = yaml.safe_load((FOLDER / "mini-sd3.yaml").read_text(encoding="utf-8"))
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({**content, "resolution": resolution}), encoding="utf-8")
    with pytest.raises(UsageError, match=rf"its resolution's {side} of 3\d is no multiple of 8; use 32 or 40"):
        resolve(str(tmp_path / "m.yaml"))


def test_prompts_that_the_encoder_cuts_are_named_once_and_counted(
    make_policy: Callable[..., Policy], caplog: pytest.LogCaptureFixture
):
    texts, long = make_policy().texts, "a red circle above a blue square and a green cross left of a large yellow"
    texts.announce(["a red circle", f"{long} triangle", f"{long} square"])
    texts.encode([f"{long} square", "a blue square", f"{long} cross"])
    assert texts.cut == {f"{long} {shape}" for shape in ("triangle", "square", "cross")}
    (said,) = caplog.messages
    assert said.startswith(
        "2 prompts are longer than the 16 tokens that the text encoder reads, and their ends are cut"
    )


def test_a_split_that_was_asked_for_and_is_not_there_is_refused(lines: Path, preset_file: str):
    with pytest.raises(UsageError, match="has no split 'dev'"):
        resolve(preset_file, str(lines), evaluation__splits=["test", "dev"])
    with pytest.raises(UsageError, match=r"unknown prompt set 'shapse', .*did you mean 'shapes'"):
        resolve(preset_file, "shapse")


def test_prompts_stand_in_a_configuration_file_relative_to_it(lines: Path, preset_file: str, tmp_path: Path):
    config = resolve(preset_file, str(lines))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json") | {"prompts": "mine.txt"}), encoding="utf-8")
    given = read_config_file(path)
    plain = {name: given.pop(name) for name in ("algorithm", "reward", "model", "seed", "device", "prompts")}
    assert resolve_config(**plain, overrides=given) == config


# --- presets ------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, preset_file: str) -> Path:
    """A folder with a preset, and beside it the prompts, the model and a reward's weights that it names."""
    folder = tmp_path / "project"
    (folder / "sets").mkdir(parents=True)
    for name, chosen in (("train", LINES[:6]), ("test", LINES[6:])):
        (folder / "sets" / f"{name}.txt").write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")
    (folder / "judge").symlink_to(weights_folder() / "mini-clip")
    (folder / "model").symlink_to(weights_folder() / "mini-sd3")
    content = yaml.safe_load(Path(preset_file).read_text(encoding="utf-8"))
    content |= {"name": "mine", "source": "model", "prompts": "sets", "rewards": {"clip": {"model": "judge"}}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


def test_paths_in_a_preset_are_relative_to_it(project: Path, monkeypatch: pytest.MonkeyPatch, preset_file: str):
    monkeypatch.chdir("/")
    preset = load_preset(str(project / "mine.yaml"))
    assert preset.prompts == str(project / "sets")
    assert Path(preset.source) == (weights_folder() / "mini-sd3").resolve()
    assert preset.rewards["clip"]["model"] == str((weights_folder() / "mini-clip").resolve())
    assert load_preset(preset_file).rewards == load_preset("mini-sd3").rewards


def test_a_built_in_set_is_meant_even_if_a_folder_of_its_name_lies_beside_the_preset(project: Path):
    (project / "sets").rename(project / "shapes")
    text = (project / "mine.yaml").read_text(encoding="utf-8")
    (project / "mine.yaml").write_text(text.replace("prompts: sets", "prompts: shapes"), encoding="utf-8")
    assert load_preset(str(project / "mine.yaml")).prompts == "shapes"


def test_the_hash_says_what_a_presets_files_hold_and_not_where_they_lie(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(project)
    before = resolve("mine.yaml").hash()
    shutil.copytree(project, tmp_path / "elsewhere", symlinks=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resolve("mine.yaml").hash() == before
    with (tmp_path / "elsewhere" / "sets" / "train.txt").open("a", encoding="utf-8") as file:
        file.write("one more\n")
    assert resolve("mine.yaml").hash() != before


# --- run folders --------------------------------------------------------------------------------------------------


def test_a_finished_run_needs_neither_its_preset_nor_its_prompts_nor_its_place(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(project)
    folder = tmp_path / "run"
    record = execute(resolve("mine.yaml", evaluation__judges=["clip"]), folder, "", resume=False)
    for path in (project / "mine.yaml", project / "sets", project / "judge", project / "model"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    monkeypatch.chdir("/")
    again = evaluate(folder, {}, None, "cpu", silent)
    assert again.scores == record.scores
    assert again.held_out == ("clip",)
    assert sample_side_by_side(folder, "a sign for $5_{ and $10", 1, 0, "cpu", None).is_file()
    assert load_split(str(folder / "prompts"), "train").prompts == tuple(LINES[:6])
    assert load_split(str(folder / "prompts"), "test").sha256 == record.prompt_hashes["test"]
    assert load_preset(str(folder / "preset.yaml")).name == "mine"


def test_a_run_on_a_file_keeps_both_halves_and_its_reference_images(
    preset_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = tmp_path / "given"
    given.mkdir()
    entries = [{"prompt": line, "n": k, "reference": f"{k}.png"} for k, line in enumerate(LINES)]
    for k in range(len(LINES)):
        Image.new("RGB", (2, 2), (k, k, k)).save(given / f"{k}.png")
    (given / "mine.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    config = resolve(preset_file, str(given / "mine.jsonl"), evaluation__judges=[])
    folder = tmp_path / "run"
    record = execute(config, folder, "", resume=False)
    assert load_record(folder / "record.json").config["prompts"] == str(given / "mine.jsonl")
    test = load_split(str(given / "mine.jsonl"), "test")
    assert set(record.prompts["test"]) <= {p.text for p in test.prompts}
    assert record.prompt_hashes["test"] == test.sha256
    shutil.rmtree(given)
    kept = load_split(str(folder / "prompts"), "test").prompts
    for p in kept:
        assert p.reference is not None
        with Image.open(p.reference) as image:
            assert image.getpixel((0, 0)) == (p.metadata["n"],) * 3
    assert evaluate(folder, {}, None, "cpu", silent).scores == record.scores


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, preset_file: str) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    execute(resolve(preset_file, evaluation__judges=["clip", "oracle"]), folder, "", resume=False)
    return folder


def test_all_prompts_of_a_file_are_one_split_of_an_evaluation(finished: Path, lines: Path):
    settings_ = {"evaluation.prompts": 20, "evaluation.judges": ["clip"]}
    result = evaluate(finished, settings_, None, "cpu", silent, str(lines))
    assert set(result.scores) == {f"{metric}/mine" for metric in ("jpeg", "clip", "w2", "diversity")}
    with pytest.raises(UsageError, match=r"are one split; leave out evaluation\.splits"):
        evaluate(finished, {"evaluation.splits": ["test"]}, None, "cpu", silent, str(lines))
    with pytest.raises(UsageError, match=r"judge 'oracle' reads only the world of shapes, and not the prompts '.*mine"):
        evaluate(finished, {}, None, "cpu", silent, str(lines))


def test_a_run_is_evaluated_on_splits_that_it_did_not_use(finished: Path):
    result = evaluate(finished, {"evaluation.splits": ["compositional"]}, None, "cpu", silent)
    assert {"oracle_exact/compositional", "clip/compositional"} <= set(result.scores)


def test_weights_are_evaluated_on_other_prompts(
    make_policy: Callable[..., Any], tmp_path: Path, preset_file: str, lines: Path
):
    make_policy().save(tmp_path / "same")
    asked = {"evaluation.prompts": 2, "evaluation.images_per_prompt": 2}
    result = evaluate(tmp_path / "same", asked, preset_file, "cpu", silent, str(lines))
    assert result.scores["clip/mine"].tuned == result.scores["clip/mine"].base
    assert not any(name.startswith("oracle") for name in result.scores)


def test_prompts_are_an_option_of_run(
    flowbench_main: Callable[..., int], lines: Path, preset_file: str, capsys: pytest.CaptureFixture
):
    arguments = ["--model", preset_file, "--reward", "jpeg", "--dry-run"]
    assert flowbench_main("run", "nft", "--prompts", lines, *arguments) == 0
    assert f"prompts: {lines}" in capsys.readouterr().out.replace("\n", "")
    lines.write_text("a cat\n\n", encoding="utf-8")
    assert flowbench_main("run", "nft", "--prompts", lines, *arguments) == 2
    assert "mine.txt line 2: the prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["$5_{ off and $10", "100 % of \\frac{", "a_b^c"])
def test_a_prompt_is_drawn_as_it_stands(text: str, tmp_path: Path):
    from flowbench.reporting.plots import sample_grid

    sample_grid(tmp_path / "grid.png", {"base": torch.rand(1, 2, 3, 8, 8)}, [text])
    assert (tmp_path / "grid.png").is_file()
