"""Readers of prompt files: plain text, tables with and without a header, JSON lines.

Lines end at newlines alone (a line separator U+2028 within a prompt is text), and files are UTF-8 with or without a
byte-order mark. A file that fits no format is refused with the line that does not fit.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbench.errors import UsageError
from flowbench.prompts.prompt import Prompt
from flowbench.reading.texts import TextError, lines, read_text

PROMPT = ("prompt", "prompts", "caption", "text")  # names of the prompt's column; the first that is there is it
CATEGORY = ("category", "tag")
REFERENCE = "reference"
KNOWN = frozenset({*PROMPT, *CATEGORY, REFERENCE})
PLAIN = ("category", "prompt")  # the columns of a table without a header
EXPECTED = {
    ".txt": "one prompt per line",
    ".tsv": "a header with a column 'prompt', or lines of 'category<TAB>prompt'",
    ".csv": f"a header with a column {', '.join(PROMPT[:-1])} or {PROMPT[-1]}",
    ".jsonl": 'lines of {"prompt": "...", ...}',
}


@dataclass(frozen=True)
class Row:
    """One entry of a file: its values by column, and for messages where it stands ("FILE line 3")."""

    place: str
    values: Mapping[str, Any]


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a file, at least one.

    .txt: one prompt a line. .tsv: with a header, or exactly category and prompt; quote marks are text. .csv: with a
    header, quoted as usual. .jsonl: one object a line. Columns and keys are found whatever their case: prompt (or
    prompts, caption, text), category (or tag), reference (an image's path relative to the file); all others are
    metadata, and so is a tag.
    Raises UsageError, naming the line and what was expected, for anything else, an empty prompt or an empty file.
    """
    rows = read_rows(path, PLAIN)
    if not rows:
        raise UsageError(f"{path} line 1 holds no prompt; expected {EXPECTED[path.suffix.lower()]}")
    return tuple(make_prompt(row, path.parent) for row in rows)


def read_rows(path: Path, plain: Sequence[str]) -> list[Row]:
    """The entries of a file. plain: the columns of a .tsv without a header, of which all but category must be there.

    Raises UsageError for a file of another kind, or a line that does not fit.
    """
    readers = {".txt": _lines, ".tsv": _tsv, ".csv": _csv, ".jsonl": _json_lines}
    if path.suffix.lower() not in readers:
        raise UsageError(f"'{path}' is no file of prompts; its name must end in {', '.join(readers)}")
    return list(readers[path.suffix.lower()](_text(path), path, plain))


def make_prompt(row: Row, folder: Path, besides: Sequence[str] = ()) -> Prompt:
    """The prompt of an entry of a file in this folder; `besides` names columns that are no metadata of it.

    Raises UsageError when it has no prompt, an empty one, or values of the wrong type.
    """
    keys = _known(row, {*KNOWN, *besides})
    text_key = next((keys[name] for name in PROMPT if name in keys), None)
    if text_key is None:
        raise UsageError(f"{row.place} has no prompt; expected a key {', '.join(PROMPT[:-1])} or {PROMPT[-1]}")
    text = _string(row, text_key).strip()
    if not text:
        raise UsageError(f"{row.place}: the prompt is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{row.place}: the prompt holds half a character ({error.reason})") from error
    category_key = next((keys[name] for name in CATEGORY if name in keys), None)
    category = _string(row, category_key).strip() if category_key else ""
    # A tag is part of what such files' own evaluators read (GenEval), so it stays among the metadata.
    used = {text_key, *(keys[name] for name in ("category", REFERENCE, *besides) if name in keys)}
    metadata = {key: value for key, value in row.values.items() if key not in used and value != ""}
    return Prompt(text, category, metadata, _reference(row, keys.get(REFERENCE), folder))


def _known(row: Row, names: set[str]) -> dict[str, str]:
    """The entry's own spelling of each known column that it has."""
    keys: dict[str, str] = {}
    for key in row.values:
        name = key.casefold()
        if name in keys:
            raise UsageError(f"{row.place} has both '{keys[name]}' and '{key}'; keep one of them")
        if name in names:
            keys[name] = key
    return keys


def _string(row: Row, key: str) -> str:
    value = row.values[key]
    if not isinstance(value, str | None):
        raise UsageError(f"{row.place}: '{key}' is {json.dumps(value)[:40]}; expected a string")
    return value or ""


def _reference(row: Row, key: str | None, folder: Path) -> Path | None:
    name = _string(row, key).strip() if key else ""
    if not name:
        return None
    path = (folder / name).resolve()
    if not path.is_file():
        raise UsageError(f"{row.place}: there is no reference image '{name}' beside the file")
    return path


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except TextError as error:
        raise UsageError(f"prompt file '{path}' {error}") from error


def _lines(text: str, path: Path, plain: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(lines(text), start=1):
        yield Row(f"{path} line {number}", {"prompt": line})


def _json_lines(text: str, path: Path, plain: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(lines(text), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            entry = json.loads(line, object_pairs_hook=_once, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{place} is not JSON: {error}; expected {EXPECTED['.jsonl']}") from error
        if not isinstance(entry, dict):
            raise UsageError(f"{place} is not an object; expected {EXPECTED['.jsonl']}")
        yield Row(place, entry)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        raise ValueError("a key stands twice")
    return entry


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _csv(text: str, path: Path, plain: Sequence[str]) -> Iterator[Row]:
    rows = _cells(csv.reader(io.StringIO(text), strict=True), path)
    number, header = next(rows, (1, [""]))
    if not _is_header(header, set()):
        raise UsageError(f"{path} line {number} is no header; expected {EXPECTED['.csv']}")
    yield from _under_header(header, rows, path, number)


def _tsv(text: str, path: Path, plain: Sequence[str]) -> Iterator[Row]:
    # Quote marks are text: PartiPrompts.tsv has prompts that begin with one.
    rows = _cells(csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE), path)
    first = next(rows, None)
    if first is None:
        return
    form = "<TAB>".join(plain)
    if _is_either(first[1]):
        raise UsageError(
            f"{path} line {first[0]} may be a header or a first prompt; begin the file with the line '{form}'"
        )
    if _is_header(first[1], set(plain) - KNOWN):
        yield from _under_header(first[1], rows, path, first[0])
        return
    if len(first[1]) != len(plain):
        raise UsageError(f"{path} line {first[0]} is not '{form}', nor a header with a column 'prompt'")
    yield Row(f"{path} line {first[0]}", dict(zip(plain, first[1], strict=True)))
    for number, cells in rows:
        if len(cells) != len(plain):
            raise UsageError(f"{path} line {number} is not '{form}'")
        yield Row(f"{path} line {number}", dict(zip(plain, cells, strict=True)))


def _cells(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table that are not blank, each with the number of its first line."""
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError(f"{path} line {number} is no row of a table: {error}") from error
        if cells and cells != [""]:
            yield number, cells


def _is_header(cells: Sequence[str], required: set[str]) -> bool:
    """Whether a first row names columns: a prompt's, and the required ones."""
    names = {cell.strip().casefold() for cell in cells}
    return bool(names & {*PROMPT}) and required <= names


def _is_either(cells: Sequence[str]) -> bool:
    """Whether a first row may name two columns, or be the first prompt of a category named "text" or "caption"."""
    names = [cell.strip().casefold() for cell in cells]
    return len(names) == 2 and names[0] in ("text", "caption") and names[1] not in {*KNOWN, "file"}


def _under_header(
    header: Sequence[str], rows: Iterator[tuple[int, list[str]]], path: Path, number: int
) -> Iterator[Row]:
    names = [cell.strip() for cell in header]
    if "" in names:
        raise UsageError(f"{path} line {number}: column {names.index('') + 1} has no name; name it or take it out")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice:
        raise UsageError(f"{path} line {number}: column '{twice}' stands twice; keep one of them")
    for number, cells in rows:
        if len(cells) != len(names):
            raise UsageError(
                f"{path} line {number} has {len(cells)} columns; expected {len(names)} as in the header: "
                + ", ".join(names)
            )
        yield Row(f"{path} line {number}", dict(zip(names, cells, strict=True)))
