"""Where the embedded weights lie, and whether they are as they were shipped."""

from __future__ import annotations

from pathlib import Path

from flowbench.errors import RunError
from flowbench.reading.checksums import SUMS, file_sha256, read_sums, write_sums

MODELS = ("mini-sd3", "mini-clip")  # what the embedded preference models are built from
CARDS = ("README.md", "scores.json")  # that nothing is computed from


def weights_folder() -> Path:
    """The folder with one subfolder per embedded model."""
    return Path(__file__).parent / "weights"


def embedded_models() -> list[str]:
    """Names of the models shipped with the package."""
    return sorted(folder.name for folder in weights_folder().iterdir() if folder.is_dir())


def check_shipped(place: Path, folder: Path | None = None) -> None:
    """Whether an embedded model is as flowbench ships it; of another place nothing is known.

    place: the model's folder or a file in it; folder: in place of `weights_folder`.
    Raises RunError that names a file which was changed, lost or added.
    """
    home = (folder or weights_folder()).resolve()
    target = place.resolve()
    if not target.is_relative_to(home) or target == home:
        return
    model = target.relative_to(home).parts[0]
    shipped = {name: digest for name, digest in read_sums(home / SUMS).items() if name.startswith(f"{model}/")}
    there = {file.relative_to(home).as_posix(): file for file in _files(home / model)}
    remedy = "install flowbench again, or rebuild it with 'flowbench testbed build'"
    for name in sorted({*shipped, *there}):
        if name not in there:
            raise RunError(f"'{home / name}' is missing; {remedy}")
        if shipped.get(name) != file_sha256(there[name]):
            raise RunError(f"'{home / name}' is not the file that flowbench ships (its checksum differs); {remedy}")


def write_shipped_sums(folder: Path) -> None:
    """Write the checksums of all embedded models, after a build."""
    write_sums(folder / SUMS, (file for model in folder.iterdir() if model.is_dir() for file in _files(model)))


def _files(model: Path) -> list[Path]:
    hidden = (file for file in model.rglob("*") if file.is_file() and file.name not in CARDS)
    return [file for file in hidden if not any(part.startswith(".") for part in file.relative_to(model).parts)]
