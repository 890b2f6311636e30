"""A run told to experiment trackers, by way of accelerate's: its settings, every iteration, its scores and samples.

A tracker is a guest: it is no part of the configuration and its hash, and one that fails is dropped with a warning.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVarTuple

import numpy as np

from flowbench.config import RunConfig
from flowbench.errors import UsageError, did_you_mean
from flowbench.experiments.run import Listener
from flowbench.files import write_atomically
from flowbench.models.presets import load_preset
from flowbench.names import path_name
from flowbench.reading.pictures import read_pixels
from flowbench.record import Record
from flowbench.training.trainer import IterationLog

PROJECT = "flowbench"
IDENTITY = "tracking-id"  # in the run folder, for trackers that know a run by an identity and not by its folder

Arguments = TypeVarTuple("Arguments")

logger = logging.getLogger("flowbench")


def choose_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """The trackers that are named, each once; a name may be several with commas between them.

    Raises UsageError for one that accelerate does not know or whose package is not installed.
    """
    chosen = tuple(dict.fromkeys(part.strip() for name in names for part in name.split(",") if part.strip()))
    if not chosen:
        return ()
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    here = {str(tracker) for tracker in get_available_trackers()}
    for name in chosen:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UsageError(f"unknown tracker '{name}'{did_you_mean(name, LOGGER_TYPE_TO_CLASS)}")
        if name in LoggerType.list() and name not in here:  # a plug-in's own tracker is on no list
            raise UsageError(f"tracker '{name}' is not installed; pip install {name.replace('_', '-')}")
    return chosen


@contextmanager
def tracked(names: Sequence[str], config: RunConfig, folder: Path, listener: Listener) -> Iterator[Listener]:
    """A listener for `run.execute` that tells these trackers too, beside the given one; they end with the context.

    names: as `choose_trackers` gives them; folder: the run's.
    """
    if not names:
        yield listener
        return
    tracking = Tracking(names, config, folder)
    try:
        yield Listener(
            on_start=_both(listener.on_start, tracking.start),
            on_iteration=_both(listener.on_iteration, tracking.iteration),
            on_evaluation=listener.on_evaluation,
            on_point=listener.on_point,
            on_record=_both(listener.on_record, tracking.record),
        )
    finally:
        tracking.finish()


class Tracking:
    """The trackers of one run. A step is an iteration; the scores and samples of its end are at the last one."""

    def __init__(self, names: Sequence[str], config: RunConfig, folder: Path) -> None:
        self.names, self.config, self.folder = names, config, folder
        self.trackers: dict[str, Any] = {}
        self.step = 0

    def start(self, iteration: int, iterations: int) -> None:
        """Start all of them; with `iteration` above 0, continue what an interrupted run has told them."""
        from accelerate import PartialState

        PartialState()  # their own messages ask it which process this is
        self.step = iteration
        for name in self.names:
            with self._guarded(name):
                tracker = self._open(name, resumed=iteration > 0)
                if not iteration:
                    tracker.store_init_configuration(settings(self.config))
                self.trackers[name] = tracker

    def iteration(self, log: IterationLog) -> None:
        """Tell what metrics.jsonl has of an iteration."""
        self.step = log.iteration
        plain = {"reward": log.reward, "reward_std": log.reward_std, "images": log.images, "seconds": log.seconds}
        values = {f"train/{name}": value for name, value in {**log.metrics, **plain}.items()}
        self._tell(lambda name, tracker: tracker.log(values, step=self.step))

    def record(self, record: Record, folder: Path) -> None:
        """Tell the scores of base and tuned model, and show the grids of samples that the run folder has."""
        values = {
            f"evaluation/{metric}/{which}": value
            for metric, score in record.scores.items()
            for which, value in (("base", score.base), ("tuned", score.tuned), ("change", score.change))
        }
        self._tell(lambda name, tracker: tracker.log(values, step=self.step))
        grids = {f"samples/{path.stem}": read_pixels(path) for path in sorted((folder / "samples").glob("*.png"))}
        if grids:
            self._tell(lambda name, tracker: show(name, tracker, grids, self.step))

    def finish(self) -> None:
        """Let each write what it still holds."""
        self._tell(lambda name, tracker: tracker.finish())

    def _tell(self, what: Callable[[str, Any], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            with self._guarded(name):
                what(name, tracker)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Within it, a tracker that fails is dropped; a run of days must not end for a picture of it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - other people's code, and their servers
            self.trackers.pop(name, None)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("tracker '%s' has failed and is told nothing more, the run goes on: %s", name, reason)

    def _open(self, name: str, resumed: bool) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        cls = LOGGER_TYPE_TO_CLASS[name]
        place = (str(self.folder),) if cls.requires_logging_directory else ()
        tracker = cls("tensorboard" if name == "tensorboard" else PROJECT, *place, **self._arguments(name, resumed))
        tracker.start()
        return tracker

    def _arguments(self, name: str, resumed: bool) -> dict[str, Any]:
        """What makes a tracker know the run by name, keep its files in the run folder, and continue it."""
        config = self.config
        parts = (config.algorithm, path_name(config.reward), load_preset(config.model).name, self.folder.name)
        title = "-".join(parts)
        known: dict[str, Callable[[], dict[str, Any]]] = {
            "tensorboard": lambda: {"purge_step": self.step + 1} if resumed else {},
            "wandb": lambda: {"name": title, "id": self._identity(), "resume": "allow", "dir": str(self.folder)},
            "trackio": lambda: {"name": title, "resume": "allow" if resumed else "never"},
            "dvclive": lambda: {"dir": str(self.folder / "dvclive"), "resume": resumed},
            "swanlab": lambda: {"experiment_name": title, "logdir": str(self.folder / "swanlog")},
            "mlflow": lambda: {"run_name": title},
            "clearml": lambda: {"task_name": title},
        }
        return known[name]() if name in known else {}

    def _identity(self) -> str:
        path = self.folder / IDENTITY
        if not path.is_file():
            write_atomically(path, secrets.token_hex(8))
        return path.read_text(encoding="utf-8")


def settings(config: RunConfig) -> dict[str, str | int | float | bool]:
    """A run's settings by the names that `--set` has for them; what is unset is left out, sequences are text."""
    content = config.model_dump(mode="json")
    sections = {name: content.pop(name) for name in ("training", "evaluation")}
    sections["algorithm"] = content.pop("hyperparameters")
    flat = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    every = {**content, "config_hash": config.hash(), **flat}
    return {
        name: value if isinstance(value, str | int | float) else str(value)
        for name, value in every.items()
        if value is not None
    }


def show(name: str, tracker: Any, pictures: dict[str, np.ndarray], step: int) -> None:
    """Give a tracker pictures (H, W, 3) of bytes, in the form that it takes; one that takes none is given none."""
    if name == "tensorboard":
        batches = {title: picture[None] for title, picture in pictures.items()}
        tracker.log_images(batches, step=step, dataformats="NHWC")
    elif name == "trackio":
        import trackio

        tracker.log({title: trackio.Image(picture) for title, picture in pictures.items()}, step=step)
    elif name in ("aim", "clearml"):
        tracker.log_images(pictures, step=step)
    elif hasattr(tracker, "log_images"):
        tracker.log_images({title: [picture] for title, picture in pictures.items()}, step=step)


def _both(first: Callable[[*Arguments], None], second: Callable[[*Arguments], None]) -> Callable[[*Arguments], None]:
    def told(*arguments: *Arguments) -> None:
        first(*arguments)
        second(*arguments)

    return told
