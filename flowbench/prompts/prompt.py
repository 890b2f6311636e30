"""One prompt: a string that also carries what its file says of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any


class Prompt(str):
    """A prompt's text, with its category, metadata and reference image; equal to, and hashed as, its text.

    category: "" if the file names none. metadata: JSON values by key, as the file spells it (objects, the text to be
    written, ...). reference: an image that belongs to the prompt, or None. All of them are read-only, and survive
    copying, pickling and every selection from a sequence of prompts; a string made from a prompt (`p.lower()`,
    `p + "."`) is a plain one.
    """

    __slots__ = ("_category", "_metadata", "_reference")

    _category: str
    _metadata: Mapping[str, Any]
    _reference: Path | None

    def __new__(
        cls, text: str, category: str = "", metadata: Mapping[str, Any] | None = None, reference: Path | None = None
    ) -> Prompt:
        """A prompt of that text; metadata is copied."""
        self = super().__new__(cls, text)
        self._category, self._reference = category, reference
        self._metadata = MappingProxyType(dict(metadata or {}))
        return self

    @property
    def text(self) -> str:
        """The text alone, as a plain string."""
        return str(self)

    @property
    def category(self) -> str:
        """What kind of prompt it is, such as "counting"."""
        return self._category

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What else the file says of the prompt."""
        return self._metadata

    @property
    def reference(self) -> Path | None:
        """An image that belongs to the prompt."""
        return self._reference

    def __reduce__(self) -> tuple[type[Prompt], tuple[str, str, dict[str, Any], Path | None]]:
        return Prompt, (self.text, self.category, dict(self.metadata), self.reference)


def as_prompt(text: str) -> Prompt:
    """The prompt itself, or a plain string as a prompt of which nothing more is known."""
    return text if isinstance(text, Prompt) else Prompt(text)
