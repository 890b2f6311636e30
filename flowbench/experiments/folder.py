"""A run's folder: where it is, whose it is at the moment, how it is begun, continued and begun anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from flowbench.config import PRESET, EvaluationConfig, RunConfig, TrainingConfig
from flowbench.errors import UsageError
from flowbench.files import TEMPORARY, remove_unfinished, write_atomically
from flowbench.locks import HOLDER, LOCK, locked
from flowbench.models.presets import load_preset
from flowbench.names import path_name
from flowbench.reading.checksums import check_listed, read_sums, write_sums
from flowbench.reading.documents import DocumentError, read_yaml
from flowbench.record import DONE, Record, load_record
from flowbench.training.checkpoint import CHECKPOINT, EARLIER, METRICS, checkpoint_files
from flowbench.training.points import POINTS

CONFIG, RECORD = "config.yaml", "record.json"

# All that flowbench writes into a run folder, its own trackers' files among it; "*" is any name, folders included.
LOCKS = (LOCK, HOLDER)
WRITTEN = (
    *(CONFIG, PRESET, RECORD, DONE, METRICS, POINTS, CHECKPOINT, EARLIER, "checkpoints/tuned/*", "prompts/*"),
    *("curves.*", "metrics.png", "frontier.*", "samples/*.png", "images/images.csv", "images/*/*.png"),
    *("tracking-id", "tensorboard/*", "wandb/*", "dvclive/*", "swanlog/*", f"*{TEMPORARY}*"),
)
TEXTS = (CONFIG, PRESET, METRICS, POINTS, "prompts/*")
# Settings in which runs of one folder may differ.
FREE = {"device", *(f"training.{name}" for name in TrainingConfig.divides | TrainingConfig.observes)}
FREE |= {f"evaluation.{name}" for name in EvaluationConfig.divides | EvaluationConfig.observes}
LOOKED_AT = 500  # folders, for the nearest run


def run_folder(output: Path, config: RunConfig) -> Path:
    """runs/<model>/<reward>/<algorithm>/<config-hash>-s<seed>."""
    model = load_preset(config.model).name
    return output / model / path_name(config.reward) / path_name(config.algorithm) / f"{config.hash()}-s{config.seed}"


def finished_record(folder: Path) -> Record | None:
    """The record of the finished run in a folder, or None if there is no such run.

    Raises UsageError for a record that cannot be read.
    """
    return load_record(folder / RECORD) if (folder / DONE).exists() else None


def mark_finished(folder: Path) -> None:
    """Write the mark of a finished run, with the checksums of its texts; its record and weights have their own."""
    texts = (path for name in TEXTS for path in folder.glob(name) if path.is_file())
    write_sums(folder / DONE, texts)


def check_finished(folder: Path) -> None:
    """Raise UsageError where a text of a finished run is not as it was at its end; one that is gone is passed over."""
    for name in (CONFIG, *read_sums(folder / DONE)):
        check_listed(folder / name, folder / DONE)


@contextmanager
def occupied(folder: Path, config: RunConfig, resume: bool, overwrite: bool = False) -> Iterator[None]:
    """Within it the run folder is this process's, made ready for a run: with its config.yaml, and on `resume` with what
    is there of it, else empty.

    Raises UsageError when it holds a finished run, or an unfinished one without `resume`, in both cases unless
    `overwrite`; when there is nothing to continue; or for `overwrite` where other files are. Raises BusyError when
    another process works there.
    """
    if resume and not _begun(folder):
        raise UsageError(f"nothing to resume in {folder}; {_instead(folder, config)}")
    if not overwrite and (folder / DONE).exists():
        raise UsageError(f"this run is finished: {folder}; change --seed or a setting, or begin anew with --overwrite")
    with locked(folder, f"run folder '{folder}'"):
        if not overwrite and (folder / DONE).exists():
            raise UsageError(f"this run was finished just now: {folder}")
        if not resume and not overwrite and checkpoint_files(folder):
            raise UsageError(
                f"an unfinished run is in {folder}; add --resume to continue it, or --overwrite to begin anew"
            )
        if not resume:
            empty(folder, strictly=overwrite)
        for place in (folder, folder / "checkpoints"):
            remove_unfinished(place)
        write_atomically(folder / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        yield


def empty(folder: Path, strictly: bool) -> None:
    """Remove what flowbench wrote into a run folder, and nothing else.

    Raises UsageError, before anything is removed, if `strictly` and there are other files.
    """
    ours: list[Path] = []
    others: list[Path] = []
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        (ours if any(fnmatchcase(name, pattern) for pattern in WRITTEN) else others).append(path)
    if strictly and others:
        raise UsageError(f"'{others[0]}' is not flowbench's, and --overwrite removes no such file; move it away")
    # The mark of a finished run first: what an interruption leaves is not taken for one. The configuration last.
    for path in sorted(ours, key=lambda p: (p.name != DONE, p.name == CONFIG)):
        path.unlink(missing_ok=True)
    places = {place for path in ours for place in path.parents if folder in place.parents}
    for place in sorted(places, reverse=True):
        if not any(place.iterdir()):
            place.rmdir()


def _files(folder: Path) -> list[Path]:
    """All files and links below a folder, but those of its lock; links are not followed."""
    inside = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return [p for p in inside if p.parent != folder or p.name not in LOCKS]


def _begun(folder: Path) -> bool:
    """Whether a run was begun in a folder, however little of it is there."""
    return any((folder / name).exists() for name in (LOCK, CONFIG)) or bool(checkpoint_files(folder))


def _instead(folder: Path, config: RunConfig) -> str:
    """What `--resume` may have meant: the run that differs in the fewest settings, first among its neighbours."""
    wanted = _flat(config.model_dump(mode="json"))
    output = folder.parents[min(3, len(folder.parents) - 1)]
    if folder != run_folder(output, config):
        return "drop --resume"
    for pattern, place in ((f"*/{CONFIG}", folder.parent), (f"*/*/*/*/{CONFIG}", output)):
        found = []
        for path in islice(place.glob(pattern), LOOKED_AT):
            try:
                theirs = _flat(read_yaml(path))
            except (DocumentError, AttributeError):
                continue
            deciding = [key for key in {**wanted, **theirs} if key not in FREE]
            differs = [key for key in deciding if wanted.get(key) != theirs.get(key)]
            found.append((len(differs), str(path.parent), [(key, theirs.get(key), wanted.get(key)) for key in differs]))
        if found:
            count, nearest, differences = min(found, key=lambda each: each[:2])
            if not differences:
                return f"the nearest run is {nearest}, of another version of model, prompts or plug-ins"
            key, there, here = differences[0]
            more = f" and {count - 1} more" if count > 1 else ""
            return f"the nearest run is {nearest}, where {key} is {there!r} and not {here!r}{more}"
    return f"there is no run below {output}; check --output, or drop --resume"


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their full names."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
