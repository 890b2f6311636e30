"""YAML: plain data only, every key once, and bounded, so that a small file cannot grow to a large one."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from flowbench.reading.texts import TextError, read_text

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_NODES = 100_000  # with every alias written out


class DocumentError(ValueError):
    """A text is no YAML to be read; the message goes on where the file's name ends ("is not YAML: ...")."""


def read_yaml(path: Path) -> Any:
    """The content of a YAML file: dictionaries, lists, strings, numbers, truth values, dates, None.

    Raises DocumentError for a file that cannot be read, is not UTF-8, or that `parse_yaml` refuses.
    """
    try:
        return parse_yaml(read_text(path, MAX_BYTES))
    except TextError as error:
        raise DocumentError(str(error)) from error


def parse_yaml(text: str) -> Any:
    """The content of a text; aliases are followed.

    Raises DocumentError, with the line, for what is no YAML, has tags of other types than plain data, says a key twice,
    or is deeper or larger than MAX_DEPTH, MAX_NODES and MAX_BYTES.
    """
    if len(text) > MAX_BYTES:
        raise DocumentError(f"is larger than {MAX_BYTES} bytes")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise DocumentError(f"is not YAML: {where}{_one_line(error.problem or error.context or error)}") from error
    except yaml.YAMLError as error:
        raise DocumentError(f"is not YAML: {_one_line(error)}") from error
    except (ValueError, OverflowError) as error:  # such as 2026-13-41, which looks like a date
        raise (
            error if isinstance(error, DocumentError) else DocumentError(f"is not YAML: {_one_line(error)}")
        ) from error


def _one_line(what: object) -> str:
    return " ".join(str(what).split())


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds; of a key that stands twice it would keep the last without a word."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        try:
            if self._depth > MAX_DEPTH:
                raise DocumentError(f"{self._line()}: is nested more than {MAX_DEPTH} deep")
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            self._size(node, set())
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping without keys that stand twice; those that `<<` brings may be given anew."""
        first: dict[Hashable, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = self.construct_object(key, deep=True), key.start_mark.line + 1
            if isinstance(name, Hashable):
                if name in first:
                    raise DocumentError(
                        f"line {line}: '{_one_line(key.value)}' stands twice, first in line {first[name]}; keep one"
                    )
                first[name] = line
        return super().construct_mapping(node, deep)

    def _size(self, node: yaml.Node, within: set[int]) -> int:
        """Nodes below a node, itself included, with every alias written out."""
        if id(node) in within:
            raise DocumentError(f"line {node.start_mark.line + 1}: contains itself")
        if id(node) not in self._sizes:
            total, inner = 1, {*within, id(node)}
            for child in node.value if isinstance(node, yaml.CollectionNode) else ():
                for one in child if isinstance(child, tuple) else (child,):
                    total += self._size(one, inner)
            if total > MAX_NODES:
                raise DocumentError(f"line {node.start_mark.line + 1}: holds more than {MAX_NODES} values")
            self._sizes[id(node)] = total
        return self._sizes[id(node)]

    def _line(self) -> str:
        return f"line {self.line + 1}"
