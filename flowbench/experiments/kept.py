"""The images of an evaluation that a run folder keeps, and the table of their prompts and scores."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

from flowbench.evaluation.album import Album, KeptImage
from flowbench.files import write_atomically
from flowbench.models.processes import Processes

IMAGES, TABLE = "images", "images.csv"
COLUMNS = ("file", "split", "model", "guidance_scale", "prompt_index", "image", "noise_seed", "prompt")


def make_album(folder: Path, processes: Processes) -> Album:
    """An empty album in this folder; what an earlier one has left there is removed."""
    if processes.is_main:
        for place in folder.iterdir() if (folder / TABLE).is_file() else ():
            shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
        folder.mkdir(parents=True, exist_ok=True)
    processes.wait()
    return Album(folder)


def save_table(album: Album, noise_seed: int, processes: Processes) -> None:
    """Write images.csv beside the images: a row for each, of all processes, with the scores by metric.

    noise_seed: of the protocol; with split, prompt_index and image it decides an image's noise.
    """
    kept = [image for own in processes.objects(album.kept, "kept images") for image in own]
    if processes.is_main:
        write_atomically(album.folder / TABLE, table(kept, noise_seed))


def table(kept: Sequence[KeptImage], noise_seed: int) -> str:
    """The rows as CSV; a metric that an image has not is an empty cell."""
    metrics = list(dict.fromkeys(metric for image in kept for metric in image.scores))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*COLUMNS, *metrics])
    for image in sorted(kept, key=lambda k: k.file):
        place = (image.file, _cell(image.split), image.model, image.guidance_scale, image.prompt_index, image.image)
        scores = [repr(image.scores[metric]) if metric in image.scores else "" for metric in metrics]
        writer.writerow([*place, noise_seed, _cell(image.prompt), *scores])
    return buffer.getvalue()


def _cell(text: str) -> str:
    """Foreign text that no spreadsheet computes."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else str(text)
