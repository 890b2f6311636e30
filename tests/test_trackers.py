"""A run told to trackers: what they are told, how a resumed run continues, and that a broken one harms nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from flowbench.config import RunConfig, resolve_config
from flowbench.errors import UsageError
from flowbench.experiments.run import Listener
from flowbench.experiments.trackers import Tracking, choose_trackers, settings, tracked
from flowbench.record import Record
from flowbench.training.trainer import IterationLog

Main = Callable[..., int]
PLANE = ("--model", "gaussian", "--reward", "linear", "--images", "512", "--device", "cpu")


class Fake(GeneralTracker):
    """Remembers what it was told; fails in the method that `fails` names."""

    name = "fake"
    requires_logging_directory = False
    fails: ClassVar[str] = ""
    told: ClassVar[list[tuple[str, Any]]] = []

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self._tell("__init__", run_name)

    @property
    def tracker(self) -> None:
        return None

    def _tell(self, method: str, what: Any = None) -> None:
        self.told.append((method, what))
        if method == self.fails:
            raise ConnectionError("no server\nand a long story")

    def start(self) -> None:
        self._tell("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._tell("store_init_configuration", values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._tell("log", (step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._tell("log_images", (step, values))

    def finish(self) -> None:
        self._tell("finish")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Fake]]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "fake", Fake)
    Fake.told.clear()
    yield Fake
    Fake.fails = ""


@pytest.fixture
def config() -> RunConfig:
    return resolve_config("nft", "linear", "gaussian", overrides={}, device="cpu")


def log(iteration: int) -> IterationLog:
    return IterationLog(iteration, 16 * iteration, 0.5 * iteration, 0.1, {"fit": 1.0 / iteration}, 0.2)


def events(folder: Path) -> Any:
    """What tensorboard reads in a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), {accumulator.IMAGES: 0, accumulator.SCALARS: 0})
    return found.Reload()


def test_tensorboard_has_log_scores_samples_and_settings_of_a_run_that_another_tracker_failed(
    fake: type[Fake],
    flowbench_main: Main,
    preset_file: str,
    settings: Callable[..., list[str]],
    tmp_path: Path,
    pictures: Callable,
) -> None:
    pytest.importorskip("tensorboard")
    fake.fails = "log"
    command = ["run", "orw-cfm-w2", "--reward", "jpeg", "--model", preset_file, "--device", "cpu"]
    command += [*settings(evaluation__judges=[]), "--output", str(tmp_path), "--track", "fake,tensorboard"]
    with pictures():
        assert flowbench_main(*command) == 0
    assert [method for method, _ in fake.told][-2:] == ["store_init_configuration", "log"]
    (path,) = tmp_path.rglob("record.json")
    folder, record = path.parent, Record.model_validate_json(path.read_text(encoding="utf-8"))
    assert (folder / "DONE").exists()
    assert "track" not in (folder / "config.yaml").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seen = events(folder / "tensorboard")

    rewards = seen.Scalars("train/reward")
    assert [(point.step, point.value) for point in rewards] == [
        (line["iteration"], pytest.approx(line["reward"])) for line in lines
    ]
    (fit,) = (p.value for p in seen.Scalars("train/fit") if p.step == 1)
    assert fit == pytest.approx(lines[0]["metrics"]["fit"])
    for which in ("base", "tuned", "change"):
        (point,) = seen.Scalars(f"evaluation/jpeg/test/{which}")
        assert (point.step, point.value) == (2, pytest.approx(getattr(record.scores["jpeg/test"], which)))
    (grid,) = seen.Images("samples/test")
    assert (grid.width, grid.height) == (picture_size(folder / "samples" / "test.png"))
    (hparams,) = (folder / "tensorboard").glob("*/hparams.yml")
    assert f"config_hash: {record.config_hash}" in hparams.read_text(encoding="utf-8")


def picture_size(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.size


def test_a_resumed_run_continues_in_tensorboards_folder_with_every_iteration_once(
    config: RunConfig, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    for begun, iterations in ((0, (1, 2, 3)), (2, (3, 4))):  # interrupted after 3, with the checkpoint of 2
        tracking = Tracking(("tensorboard",), config, tmp_path)
        tracking.start(begun, 4)
        for iteration in iterations:
            tracking.iteration(log(iteration))
        tracking.finish()
    assert [point.step for point in events(tmp_path / "tensorboard").Scalars("train/reward")] == [1, 2, 3, 4]


def test_a_resumed_run_keeps_the_identity_that_wandb_knows_it_by(config: RunConfig, tmp_path: Path) -> None:
    first, second = (Tracking(("wandb",), config, tmp_path)._arguments("wandb", resumed) for resumed in (False, True))
    assert first == second
    assert first["resume"] == "allow"
    assert first["dir"] == str(tmp_path)
    assert first["id"] != Tracking(("wandb",), config, tmp_path / "other")._arguments("wandb", False)["id"]


@pytest.mark.parametrize("method", ["__init__", "start", "store_init_configuration", "log", "log_images", "finish"])
def test_a_tracker_that_fails_is_dropped_with_one_warning_and_the_others_go_on(
    method: str, fake: type[Fake], config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Sound(Fake):
        name = "sound"
        told: ClassVar[list[tuple[str, Any]]] = []

        def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
            self.told.append(("log", step))

    fake.fails = method
    told: list[str] = []
    listener = Listener(on_iteration=lambda line: told.append("iteration"), on_record=lambda *_: told.append("record"))
    (tmp_path / "samples").mkdir()
    write_picture(tmp_path / "samples" / "test.png")
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "flowbench"):
        patch.setitem(LOGGER_TYPE_TO_CLASS, "sound", Sound)
        patch.setattr(Sound, "fails", "")
        with tracked(("fake", "sound"), config, tmp_path, listener) as both:
            both.on_start(0, 2)
            both.on_iteration(log(1))
            both.on_iteration(log(2))
            both.on_record(record_of(config), tmp_path)
    (warning,) = caplog.records
    assert warning.getMessage() == ("tracker 'fake' has failed and is told nothing more, the run goes on: no server")
    assert fake.told[-1][0] == method  # it is left alone from then on
    assert told == ["iteration", "iteration", "record"]
    assert [step for kind, step in Sound.told if kind == "log"] == [1, 2, 2]


def write_picture(path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (3, 2), (255, 0, 0)).save(path)


def record_of(config: RunConfig) -> Record:
    return Record.model_construct(algorithm=config.algorithm, scores={})


def test_trackers_are_told_settings_by_their_names_in_types_that_all_of_them_take(
    fake: type[Fake], config: RunConfig, tmp_path: Path
) -> None:
    with tracked(("fake",), config, tmp_path, Listener()) as listener:
        listener.on_start(0, 2)
        listener.on_iteration(log(1))
    assert [method for method, _ in fake.told] == ["__init__", "start", "store_init_configuration", "log", "finish"]
    stored = dict(fake.told)["store_init_configuration"]
    assert stored == settings(config)
    assert stored["algorithm"] == "nft"
    assert stored["algorithm.beta"] == config.hyperparameters["beta"]
    assert stored["training.learning_rate"] == config.training.learning_rate
    assert {type(value) for value in stored.values()} <= {str, int, float, bool}
    assert dict(fake.told)["log"] == (
        1,
        {**train(fit=1.0), **train(reward=0.5, reward_std=0.1, images=16, seconds=0.2)},
    )


def train(**values: float) -> dict[str, float]:
    return {f"train/{name}": value for name, value in values.items()}


def test_a_tracker_is_named_several_times_or_with_commas(fake: type[Fake]) -> None:
    assert choose_trackers(["fake, tensorboard", "fake"]) == ("fake", "tensorboard")
    assert choose_trackers([]) == ()


def test_an_unknown_tracker_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        choose_trackers(["tensorbord"])


def test_a_tracker_that_is_not_installed_is_wrong_usage_with_the_command_that_installs_it(
    flowbench_main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    assert flowbench_main("run", "nft", *PLANE, "--output", tmp_path, "--track", "comet_ml") == 2
    assert capsys.readouterr().err == "flowbench: tracker 'comet_ml' is not installed; pip install comet-ml\n"
    assert not list(tmp_path.iterdir())
