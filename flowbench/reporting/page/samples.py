"""The wall of samples, from the images that runs kept: the same prompts and noise of several methods side by side.

A run with kept images has `images/images.csv`, a row for each file with split, model, the numbers of prompt and image,
and a column for each score. The prompts are taken evenly from each category, in their order, never by their scores.
"""

from __future__ import annotations

import base64
import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowbench.errors import UsageError
from flowbench.escape import plain
from flowbench.prompts.sets import available_splits, load_split, prompt_sets
from flowbench.reading.pictures import PictureError, read_pixels
from flowbench.record import Record, load_record
from flowbench.reporting.leaderboard import TRUTH, Board, Table
from flowbench.reporting.page import data
from flowbench.reporting.page.naming import names_of, short_names

if TYPE_CHECKING:
    from PIL import Image

PROMPTS = 48  # of a wall
ACROSS = 8  # tiles in a line of a strip
EXACT_SIZE, THUMBNAIL = 64, 128  # images up to the first size are kept as they are, larger ones become thumbnails


@dataclass(frozen=True)
class Picture:
    """A file, and whether the truth accepts it; None where that is not known."""

    file: Path
    passed: bool | None


@dataclass(frozen=True)
class Kept:
    """A run whose images were kept. row: its label as the page shows it; pictures: by model and the prompt's number."""

    record: Record
    row: str
    pictures: Mapping[tuple[str, int], Picture]


def walls(places: Sequence[Path], result: Board, limit: int = PROMPTS) -> list[data.Wall]:
    """A wall for each table that has runs with kept images below these folders; `workload` is the table's short name.

    Of each workload the seed that most methods have. Raises UsageError when a place does not exist, no run below them
    has images, or one cannot be read.
    """
    found = [wall for table, name in zip(result.tables, short_names(result), strict=True)
             if (wall := _wall(_kept(places, table), table, name, limit))]  # fmt: skip
    if not found:
        names = ", ".join(map(str, places))
        raise UsageError(f"no run of the tables has kept images below '{names}'; run them with --keep-images")
    return found


def _kept(places: Sequence[Path], table: Table) -> list[Kept]:
    names = names_of(table)
    rows = {(r.identity, r.seed): names[row.label] for row in table.rows for r in row.group.finished}
    found: dict[tuple[str, int], Kept] = {}
    for place in places:
        if not place.exists():
            raise UsageError(f"'{place}' does not exist")
        for file in sorted(place.rglob("record.json")):
            if (listed := file.parent / "images" / "images.csv").is_file():
                record = load_record(file)
                key = (record.identity, record.seed)
                if key in rows and key not in found:
                    found[key] = Kept(record, rows[key], _pictures(listed, table.split))
    return [one for one in found.values() if one.pictures]


def _pictures(listed: Path, split: str) -> dict[tuple[str, int], Picture]:
    """The first image of each prompt, of those with the model's own guidance."""
    folder, found = listed.parent.resolve(), {}
    for line in _lines(listed):
        file = (folder / (line.get("file") or "")).resolve()
        # A table may come from anybody: no file outside of its folder is read.
        if line.get("split") != split or line.get("image") != "0" or not file.is_relative_to(folder):
            continue
        number = line.get("prompt_index") or ""
        if number.isdecimal() and not file.parent.name.endswith("-unguided"):
            found[(line.get("model") or "", int(number))] = Picture(file, _passed(line.get(TRUTH)))
    return found


def _lines(listed: Path) -> list[dict[str, str]]:
    try:
        with listed.open(encoding="utf-8", newline="") as opened:
            return list(csv.DictReader(opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"'{listed}' cannot be read as a table: {error}") from error


def _passed(score: str | None) -> bool | None:
    try:
        return float(score or "") >= 0.5
    except ValueError:
        return None


def _wall(kept: Sequence[Kept], table: Table, name: str, limit: int) -> data.Wall | None:
    if not kept:
        return None
    counts = Counter(one.record.seed for one in kept)
    seed = min(counts, key=lambda s: (-counts[s], s))
    runs = [one for one in kept if one.record.seed == seed]
    places = {row.label: k for k, row in enumerate(table.rows)}
    order = {shown: places[label] for label, shown in names_of(table).items()}
    runs.sort(key=lambda one: order[one.row])
    texts = runs[0].record.prompts.get(table.split, [])
    categories = _categories(table.split)
    chosen = spread([categories.get(text, "") for text in texts], limit)
    if not chosen:
        return None
    tiles = tuple(data.Tile(prompt=plain(texts[k]), category=plain(categories.get(texts[k], ""))) for k in chosen)
    size = _size(runs[0], chosen)
    base = _strip(runs[0], "base", chosen, size)
    tuned = [_strip(one, "tuned", chosen, size) for one in runs]
    return data.Wall(workload=name, seed=seed, size=size, across=ACROSS, tiles=tiles, strips=(base, *tuned))


def spread(categories: Sequence[str], limit: int) -> list[int]:
    """At most `limit` places, as evenly from each category as there are, in order."""
    waiting: dict[str, list[int]] = {}
    for k, category in enumerate(categories):
        waiting.setdefault(category, []).append(k)
    taken: list[int] = []
    while len(taken) < limit and any(waiting.values()):
        for places in waiting.values():
            if places and len(taken) < limit:
                taken.append(places.pop(0))
    return sorted(taken)


def _categories(split: str) -> dict[str, str]:
    """The category of each prompt of the built-in sets."""
    there = [name for name in prompt_sets() if split in available_splits(name)]
    return {str(prompt): prompt.category for name in there for prompt in load_split(name, split).prompts}


def _size(one: Kept, chosen: Sequence[int]) -> tuple[int, int]:
    """Width and height of a tile."""
    for k in chosen:
        if ("tuned", k) in one.pictures:
            width, height = _open(one.pictures["tuned", k].file).size
            shrink = 1 if max(width, height) <= EXACT_SIZE else THUMBNAIL / max(width, height)
            return max(round(width * shrink), 1), max(round(height * shrink), 1)
    return EXACT_SIZE, EXACT_SIZE


def _strip(one: Kept, model: str, chosen: Sequence[int], size: tuple[int, int]) -> data.Strip:
    """The images of one model; a place whose image is missing stays black."""
    from PIL import Image

    lines = -(-len(chosen) // ACROSS)
    sheet = Image.new("RGB", (size[0] * ACROSS, size[1] * lines))
    pictures = [one.pictures.get((model, prompt)) for prompt in chosen]
    for k, picture in enumerate(pictures):
        if picture is not None:
            image = _open(picture.file)
            whole = image if image.size == size else image.resize(size)
            sheet.paste(whole, (k % ACROSS * size[0], k // ACROSS * size[1]))
    passed = [None if picture is None else picture.passed for picture in pictures]
    own = model == "tuned"
    return data.Strip(
        label=one.row if own else "base model",
        method=plain(one.record.algorithm) if own else None,
        image=_address(sheet, exact=max(size) <= EXACT_SIZE),
        passed=tuple(passed) if any(p is not None for p in passed) else (),
    )


def _open(file: Path) -> Image.Image:
    from PIL import Image

    try:
        return Image.fromarray(read_pixels(file))
    except PictureError as error:
        raise UsageError(f"'{file}' {error}") from error


def _address(sheet: Image.Image, exact: bool) -> str:
    """A picture as a data: address."""
    buffer, kind = io.BytesIO(), "png" if exact else "webp"
    if exact:
        sheet.save(buffer, "PNG", optimize=True)
    else:
        sheet.save(buffer, "WEBP", quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
