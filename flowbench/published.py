"""The published form of a record: small and readable, with what many records share in one file beside them.

    <workload>/base-<digest>.json             the base model's scores of each prompt on one noise block, and the prompts
    <workload>/<algorithm>/<hash>-s<seed>.json  a record without these, its numbers rounded to what matters

`flowbench.record.load_record` reads both forms. Both directions are functions of JSON documents, so that a record does
not know whether it was published. How older forms are read: docs/submit.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json  # json.loads would end in a RecursionError

from flowbench.errors import UsageError
from flowbench.reading.checksums import read_sums

FORMAT = 1
LARGEST = 25_000  # bytes of a published record
BASE = "base-{}.json"
MANIFEST = "MANIFEST"  # the SHA-256 of each published file, as `sha256sum --check` reads it
_BASE_NAME = re.compile(r"base-[0-9a-f]{16}\.json")

# What `load_record` looks at: the first keys of a published record are these, in this order.
_BEGINNING = re.compile(rb'\s*\{\s*"version"\s*:\s*\d+\s*,\s*"algorithm"\s*:\s*"(\\.|[^"\\])*"\s*,\s*"format"\s*:')

# Significant digits. Scores of prompts vary by a tenth of themselves, so that four say more than anybody can use, and
# three, which records have that would be too large otherwise, enough.
PER_PROMPT, SCORES, SPENT = (4, 3), 5, 5

Document: TypeAlias = "dict[str, Any]"

# By the format that it reads, a function that makes a document of the next one. Fields with a default need none.
UPGRADES: Mapping[int, Callable[[Document], Document]] = {}


class Base(BaseModel):
    """What records of one model, protocol and noise block share.

    seed: of the runs, which decides the block; prompts: texts by split; per_prompt: "metric/split" to the base model's
    score of each prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format: int
    model: str
    protocol_hash: str
    seed: int
    prompts: dict[str, list[str]]
    per_prompt: dict[str, list[float]]

    @property
    def file(self) -> str:
        """Its file's name, which holds a digest of its content: equal scores are one file, others never replace it."""
        return BASE.format(hashlib.sha256(self.text.encode()).hexdigest()[:16])

    @property
    def text(self) -> str:
        """Its file's content."""
        return as_text(self.model_dump(mode="json"))


def shortened(record: Document) -> tuple[Document, Base | None]:
    """A record's document in the published form, and what it shares with others; None for a record without scores."""
    for digits in PER_PROMPT:
        document, base = _shortened(record, digits)
        if len(as_text(document).encode()) <= LARGEST:
            break
    return document, base


def _shortened(record: Document, digits: int) -> tuple[Document, Base | None]:
    document: Document = {"version": record["version"], "algorithm": record["algorithm"], "format": FORMAT}
    base = None
    if record["per_prompt"]:
        base = Base(
            format=FORMAT,
            model=record["model"],
            protocol_hash=record["protocol_hash"],
            seed=record["seed"],
            prompts=record["prompts"],
            per_prompt={key: _rounded(sides["base"], PER_PROMPT[0]) for key, sides in record["per_prompt"].items()},
        )
    document["base"] = base.file if base else None
    document |= {key: value for key, value in record.items() if key not in (*document, "prompts", "per_prompt")}
    document["scores"] = _rounded(record["scores"], SCORES)
    for key in ("points", "dev_base", "budget", "costs"):
        document[key] = _rounded(record[key], SPENT)
    for point in document["points"]:  # of prompts at a point no statistic speaks
        point["per_prompt"] = {}
    tuned = {key: _rounded(sides["tuned"], digits) for key, sides in record["per_prompt"].items()}
    return {**document, "per_prompt": tuned}, base


def check_published(content: bytes, path: Path) -> None:
    """Raise UsageError for a published record at `path` that is another than the manifest above it says."""
    for folder in path.parents[1:4]:
        listed = read_sums(folder / MANIFEST).get(path.relative_to(folder).as_posix())
        if listed is not None and listed != hashlib.sha256(content).hexdigest():
            raise UsageError(f"'{path}' was changed after it was published; restore it")


def is_published(content: bytes) -> bool:
    """Whether a file's content is a record in the published form."""
    return _BEGINNING.match(content[:4096]) is not None


def whole(content: bytes, path: Path) -> Document:
    """The record's document of a published file at `path`, with what the file beside it holds.

    Raises UsageError for a file that is broken, written by a newer flowbench, or whose base is missing or another's.
    """
    try:
        document = from_json(content)
    except ValueError as error:
        raise UsageError(f"'{path}' is not a flowbench record: {error}") from error
    document = upgraded(document, path)
    name, tuned = document.pop("base", None), document.pop("per_prompt", {})
    if name is None:
        return {**document, "per_prompt": {}, "prompts": {}}
    base = _load_base(path, name)
    if (base.model, base.protocol_hash, base.seed) != tuple(
        document.get(k) for k in ("model", "protocol_hash", "seed")
    ):
        raise UsageError(f"'{path}' refers to '{name}', which is of another model, protocol or seed; publish it again")
    if not isinstance(tuned, dict) or not {*tuned} <= {*base.per_prompt}:
        raise UsageError(f"'{path}' has scores that its base '{name}' lacks; publish it again")
    sides = {key: {"base": base.per_prompt[key], "tuned": values} for key, values in tuned.items()}
    return {**document, "per_prompt": sides, "prompts": base.prompts}


def upgraded(document: Document, path: Path) -> Document:
    """The document in the current format.

    Raises UsageError for one of a format that this version does not know.
    """
    found = document.get("format")
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise UsageError(f"'{path}' has format {found!r}, and this version reads 1 to {FORMAT}; update flowbench")
    for step in range(found, FORMAT):
        document = {**UPGRADES[step](document), "format": step + 1}
    return document


def _load_base(path: Path, name: object) -> Base:
    """The file beside a record's folder that holds what it shares."""
    if not isinstance(name, str) or not _BASE_NAME.fullmatch(name):  # a name never leads out of its folder
        raise UsageError(f"'{path}' names no base file, but {str(name)[:80]!r}; publish it again")
    place = path.parent.parent / name
    try:
        text = place.read_text(encoding="utf-8")
        base = Base.model_validate_json(text)
    except OSError as error:
        raise UsageError(f"'{path}' needs '{place}', which cannot be read: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise UsageError(f"'{place}' is not the base of published records; restore it") from error
    if BASE.format(hashlib.sha256(text.encode()).hexdigest()[:16]) != name:
        raise UsageError(f"'{place}' was changed after it was published; restore it")
    return base


def _rounded(value: Any, digits: int) -> Any:
    """All floats within a document to so many significant digits; whole numbers without a point."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return value
        short = float(f"{value:.{digits}g}")
        return int(short) if short.is_integer() and abs(short) < 10**digits else short
    if isinstance(value, dict):
        return {key: _rounded(inner, digits) for key, inner in value.items()}
    return [_rounded(inner, digits) for inner in value] if isinstance(value, list) else value


def as_text(document: Document) -> str:
    """The document as JSON that people and diffs read: a key a line, short objects and lists in one."""
    return _spelled(document, 0) + "\n"


def _spelled(value: Any, depth: int) -> str:
    numbers = isinstance(value, list) and value and not isinstance(value[0], (dict, list, str))
    flat = json.dumps(value, ensure_ascii=False, separators=(",", ": ") if numbers else None)
    if not isinstance(value, dict) or (depth and len(flat) < 110) or not value:
        return flat
    inner = " " * (depth + 1)
    lines = [f"{inner}{json.dumps(key, ensure_ascii=False)}: {_spelled(v, depth + 1)}" for key, v in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"
