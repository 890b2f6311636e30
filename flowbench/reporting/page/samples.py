"""The wall of samples, from the images that runs kept: the same prompts and noise of several methods side by side.

A run with kept images has `images/<split>/<base|tuned>/<prompt>-<image>.png` in its folder, and images.csv with a
column `file` and one for each score. The prompts are taken evenly from each category, in their order, never by scores.
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
from flowbench.prompts.sets import available_splits, load_split, prompt_sets
from flowbench.record import Record, load_record
from flowbench.reporting.escape import plain
from flowbench.reporting.leaderboard import TRUTH, Board, Table
from flowbench.reporting.page import data
from flowbench.reporting.page.naming import names_of, short_names

if TYPE_CHECKING:
    from PIL import Image

PROMPTS = 48  # of a wall
ACROSS = 8  # tiles in a line of a strip
EXACT_SIZE, THUMBNAIL = 64, 128  # images up to the first size are kept as they are, larger ones become thumbnails


@dataclass(frozen=True)
class Kept:
    """A run whose images were kept. row: its label as the page shows it."""

    folder: Path
    record: Record
    row: str


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
            if (file.parent / "images" / table.split).is_dir():
                record = load_record(file)
                key = (record.identity, record.seed)
                if key in rows:
                    found.setdefault(key, Kept(file.parent, record, rows[key]))
    return list(found.values())


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
    size = _size(runs[0], table.split, chosen)
    base = _strip(runs[0], table.split, "base", chosen, size)
    tuned = [_strip(one, table.split, "tuned", chosen, size) for one in runs]
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


def _file(folder: Path, split: str, model: str, prompt: int) -> Path:
    return folder / "images" / split / model / f"{prompt}-0.png"


def _size(one: Kept, split: str, chosen: Sequence[int]) -> tuple[int, int]:
    """Width and height of a tile."""
    for k in chosen:
        file = _file(one.folder, split, "tuned", k)
        if file.is_file():
            width, height = _open(file).size
            shrink = 1 if max(width, height) <= EXACT_SIZE else THUMBNAIL / max(width, height)
            return max(round(width * shrink), 1), max(round(height * shrink), 1)
    raise UsageError(f"'{one.folder / 'images' / split / 'tuned'}' has no images such as 0-0.png; keep them again")


def _strip(one: Kept, split: str, model: str, chosen: Sequence[int], size: tuple[int, int]) -> data.Strip:
    from PIL import Image

    lines = -(-len(chosen) // ACROSS)
    sheet = Image.new("RGB", (size[0] * ACROSS, size[1] * lines))
    for k, prompt in enumerate(chosen):
        file = _file(one.folder, split, model, prompt)
        if file.is_file():
            image = _open(file).convert("RGB")
            sheet.paste(
                image if image.size == size else image.resize(size), (k % ACROSS * size[0], k // ACROSS * size[1])
            )
    verdicts = _verdicts(one.folder)
    passed = [verdicts.get(_file(one.folder, split, model, prompt).resolve()) for prompt in chosen]
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
        return Image.open(file)
    except (OSError, Image.DecompressionBombError) as error:
        raise UsageError(f"'{file}' cannot be read as an image: {error}") from error


def _address(sheet: Image.Image, exact: bool) -> str:
    """A picture as a data: address."""
    buffer, kind = io.BytesIO(), "png" if exact else "webp"
    if exact:
        sheet.save(buffer, "PNG", optimize=True)
    else:
        sheet.save(buffer, "WEBP", quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _verdicts(folder: Path) -> Mapping[Path, bool]:
    """Whether the truth accepts an image, by its file; empty where images.csv does not say."""
    for table in (folder / "images.csv", folder / "images" / "images.csv"):
        if table.is_file():
            with table.open(encoding="utf-8", newline="") as opened:
                return _accepted(table.parent, csv.DictReader(opened))
    return {}


def _accepted(folder: Path, lines: csv.DictReader[str]) -> dict[Path, bool]:
    found = {}
    for line in lines:
        file, score = line.get("file"), line.get(TRUTH)
        try:
            found[(folder / (file or "")).resolve()] = float(score or "") >= 0.5
        except ValueError:
            continue
    return found
