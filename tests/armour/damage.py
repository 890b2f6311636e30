"""Damages of files: of a tensor, a line, a bit. Each is a function of a file and of what Hypothesis draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from hypothesis.strategies import DataObject, integers, sampled_from
from safetensors import safe_open
from safetensors.torch import save_file

Damage = Callable[[Path, DataObject], None]


@dataclass(frozen=True)
class Shelf:
    """One kind of file. file: that is damaged; read: raises for it, or is False where it is passed over with a word;
    damages: that can be done to it."""

    kind: str
    file: Path
    read: Callable[[], object]
    damages: Sequence[str]


def one_bit(file: Path, data: DataObject) -> None:
    """A bit of the file is another."""
    content = bytearray(file.read_bytes())
    # The last newline of a log aside: without it a line is one that a killed process did not finish.
    place = data.draw(integers(0, len(content) - (2 if file.suffix == ".log" else 1)), label="byte")
    content[place] ^= 1 << data.draw(integers(0, 7), label="bit")
    file.write_bytes(content)


def cut(file: Path, data: DataObject) -> None:
    """The end is missing."""
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(integers(0, len(content) - 2), label="length")])


def line_gone(file: Path, data: DataObject) -> None:
    """A line is missing."""
    lines = file.read_bytes().splitlines(keepends=True)
    del lines[data.draw(integers(0, len(lines) - 1), label="line")]
    file.write_bytes(b"".join(lines))


def inner_line_gone(file: Path, data: DataObject) -> None:
    """A line other than the last is missing: of the last nobody can tell that it was there."""
    lines = file.read_bytes().splitlines(keepends=True)
    del lines[data.draw(integers(0, len(lines) - 2), label="line")]
    file.write_bytes(b"".join(lines))


def line_twice(file: Path, data: DataObject) -> None:
    """A line stands twice."""
    lines = file.read_bytes().splitlines(keepends=True)
    at = data.draw(integers(0, len(lines) - 1), label="line")
    file.write_bytes(b"".join([*lines[:at], lines[at], *lines[at:]]))


def of_tensor(how: str) -> Damage:
    """One tensor of a safetensors file is not as it was; what the file says beside them stays."""

    def damage(file: Path, data: DataObject) -> None:
        with safe_open(str(file), framework="pt") as stored:
            said = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        name = data.draw(sampled_from(sorted(n for n, t in tensors.items() if t.numel() and t.ndim)), label="tensor")
        value = tensors.pop(name)
        flat = value.reshape(-1)
        at = data.draw(integers(0, flat.numel() - 1), label="value") if how in ("nan", "infinite") else 0
        if how == "renamed":
            tensors[f"{name}x"] = value
        elif how in ("nan", "infinite"):
            wide = flat if flat.is_floating_point() else flat.float()
            tensors[name] = wide.index_fill(0, torch.tensor([at]), float(how[:3])).reshape(value.shape)
        elif how == "wrongly typed":
            tensors[name] = value.double() if data.draw(sampled_from([True, False])) else value.to(torch.int64)
        elif how == "of another shape":
            tensors[name] = value[:-1].clone() if len(value) > 1 else torch.cat([value, value])
        save_file({n: t.contiguous() for n, t in tensors.items()}, str(file), metadata=said)

    return damage


def of_document(how: str) -> Damage:
    """One entry of a YAML mapping is not as it was."""

    def damage(file: Path, data: DataObject) -> None:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
        name = data.draw(sampled_from(sorted(document)), label="entry")
        value = document.pop(name)
        if how == "renamed":
            document[f"{name}_x"] = value
        elif how == "wrongly typed":
            document[name] = 5 if isinstance(value, dict | list) else {"a": [1]}
        file.write_text(yaml.safe_dump(document), encoding="utf-8")

    return damage


TENSORS = ("missing", "renamed", "nan", "infinite", "wrongly typed", "of another shape")
TEXTS = ("one bit", "cut", "line gone", "line twice")
DAMAGES: dict[str, Damage] = {
    **{how: of_tensor(how) for how in TENSORS},
    **{f"entry {how}": of_document(how) for how in ("renamed", "wrongly typed")},
    **{
        "one bit": one_bit,
        "cut": cut,
        "line gone": line_gone,
        "inner line gone": inner_line_gone,
        "line twice": line_twice,
    },
}
