"""Text files: UTF-8 with or without a byte-order mark, whose lines end at newlines alone."""

from __future__ import annotations

from pathlib import Path


class TextError(ValueError):
    """A file is no text; the message goes on where the file's name ends ("cannot be read: ...")."""


def read_text(path: Path, most: int | None = None) -> str:
    """The text of a file, without its byte-order mark. most: bytes that it may have.

    Raises TextError for a file that cannot be read, is larger, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read() if most is None else file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise TextError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if most is not None and len(content) > most:
        raise TextError(f"is larger than {most} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TextError(f"line {line} is not UTF-8 text: {error.reason}") from error


def lines(text: str) -> list[str]:
    r"""The lines of a text, which end at \n or \r\n alone: a line separator such as U+2028 is text."""
    found = text.split("\n")
    return [line.removesuffix("\r") for line in (found[:-1] if not found[-1] else found)]
