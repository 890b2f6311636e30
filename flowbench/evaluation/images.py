"""Scores of a folder of images, with their prompts in a file beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from flowbench.errors import RunError, UsageError
from flowbench.evaluation.judging import Judges, Lot, score_images
from flowbench.evaluation.statistics import mean_ci95
from flowbench.models.memory import Portion
from flowbench.prompts import Prompt
from flowbench.prompts.readers import Row, make_prompt, read_rows
from flowbench.reading.pictures import PictureError, picture_size, read_picture

TABLES = ("prompts.tsv", "prompts.jsonl", "prompts.csv")
FILE = "file"  # the column of the image's name


class ImageScore(BaseModel):
    """One metric: mean over prompts of the mean over a prompt's images, with its 95 % bootstrap interval; a single
    prompt has none."""

    model_config = ConfigDict(frozen=True)

    mean: float
    ci95: tuple[float, float] | None
    prompts: int
    images: int


@dataclass(frozen=True)
class Gallery:
    """Image files and their prompts."""

    files: tuple[Path, ...]
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.files)


def has_prompts(folder: Path) -> bool:
    """Whether a folder says which prompts its images were made for."""
    return any((folder / name).is_file() for name in TABLES)


def read_gallery(folder: Path) -> Gallery:
    """The images that a table in the folder lists, with a column or key `file`; otherwise as `read_prompts` reads it.

    A prompts.tsv without a header is "file<TAB>prompt".
    Raises UsageError for a line of another form, an image that is missing, outside the folder or listed twice, and for
    an image in the folder that no line names.
    """
    table, *more = (folder / name for name in TABLES if (folder / name).is_file())
    if more:
        raise UsageError(f"'{folder}' has {table.name} and {more[0].name}; keep the one that lists its images")
    entries: dict[Path, Prompt] = {}
    for row in read_rows(table, (FILE, "prompt")):
        prompt = make_prompt(row, folder, besides=(FILE,))
        file, name = _image(row, folder)
        if file in entries:
            raise UsageError(f"{row.place}: '{name}' is listed twice")
        entries[file] = prompt
    if not entries:
        raise UsageError(f"'{table}' lists no image")
    from PIL import Image

    unnamed = sorted({f for f in folder.iterdir() if f.suffix.lower() in Image.registered_extensions()} - set(entries))
    if unnamed:
        raise UsageError(
            f"'{table}' has no prompt for {len(unnamed)} images in the folder, such as '{unnamed[0].name}'"
        )
    return Gallery(tuple(entries), tuple(entries.values()))


def _image(row: Row, folder: Path) -> tuple[Path, str]:
    """The image file of an entry, and its name as it stands there."""
    name = next((value for key, value in row.values.items() if key.casefold() == FILE), None)
    if not isinstance(name, str):
        raise UsageError(f'{row.place} is not {{"file": "...", "prompt": "..."}}: it names no file')
    name = name.strip()
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
        raise UsageError(f"{row.place}: there is no image '{name}' in the folder")
    return file, name


def score_gallery(
    gallery: Gallery, judges: Judges, batch: int, device: torch.device, progress: Callable[[int], None]
) -> dict[str, ImageScore]:
    """Scores by metric; images of one size are scored together.

    Raises RunError for a file that is no image, or images and prompts that the oracle cannot read.
    """
    portion, passes = Portion("scoring", batch), max(1, len(judges.rewards) + judges.oracle)
    scored = 0

    def tick(images: int) -> None:
        nonlocal scored
        before, scored = scored // passes, scored + images
        progress(scored // passes - before)

    by_size: dict[tuple[int, int], list[int]] = {}
    for i, file in enumerate(gallery.files):
        by_size.setdefault(_size(file), []).append(i)
    order = [i for indices in by_size.values() for i in indices]
    lots = [_lot(gallery, indices) for indices in by_size.values()]
    scores = score_images(judges, lots, device, portion, tick)
    values = {metric: score.double().numpy()[np.argsort(order)] for metric, score in scores.items()}
    prompts = list(dict.fromkeys(gallery.prompts))
    rows = [[i for i, p in enumerate(gallery.prompts) if p == prompt] for prompt in prompts]
    means = {metric: np.array([v[r].mean() for r in rows]) for metric, v in values.items()}
    return {
        metric: ImageScore(mean=float(m.mean()), ci95=mean_ci95(m), prompts=len(prompts), images=len(gallery))
        for metric, m in means.items()
    }


def _lot(gallery: Gallery, indices: list[int]) -> Lot:
    """Images of one size, read when they are scored."""
    return Lot(
        lambda rows: torch.stack([_pixels(gallery.files[i]) for i in indices[rows]]),
        tuple(gallery.prompts[i] for i in indices),
    )


def _size(file: Path) -> tuple[int, int]:
    try:
        return picture_size(file)
    except PictureError as error:
        raise RunError(f"'{file}' {error}") from error


def _pixels(file: Path) -> torch.Tensor:
    """(3, H, W) in [0, 1]."""
    try:
        pixels = read_picture(file)
    except PictureError as error:
        raise RunError(f"'{file}' {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)
