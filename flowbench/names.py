"""Names of files and folders: whatever a thing calls itself, its name never leads out of the folder it is put in."""

from __future__ import annotations

import hashlib
import re

from flowbench.errors import UsageError

LONGEST = 120  # bytes of a name; file systems take 255, and something is often put behind it
_PLUGIN = re.compile(r"\w[\w.-]*")


def path_name(text: str) -> str:
    """A name as one component of a path on any file system, and as a metric's name: never empty, ".", or "..".

    Other names may have the same one; `distinct_name` keeps them apart.
    """
    cleaned = re.sub(r"[^\w.+-]+", "-", text).strip(".") or "-"
    return cleaned if len(cleaned.encode()) <= LONGEST else f"{_cut(cleaned, LONGEST - 9)}-{_digest(text)}"


def distinct_name(text: str, length: int = 60) -> str:
    """A file's name for a free text, such as a prompt: its first words, then eight hex digits of all of it."""
    words = re.sub(r"\W+", "-", text.lower()).strip("-")
    return "-".join(filter(None, (_cut(words, length).strip("-"), _digest(text))))


def check_component(what: str, name: str) -> None:
    """Raise UsageError for a name that would lead out of its folder, be hidden there, or be no text that is seen.

    what: the thing that is named, for the message, such as "model".
    """
    if fault := component_fault(name):
        raise UsageError(f"{what} {name!r}: a name {fault}; rename it")


def component_fault(name: str) -> str | None:
    """What is wrong with a name that is put into paths as it is; None if it is one component of a path."""
    if not name.strip() or name.startswith("."):
        return "must not be empty and not begin with a dot"
    if any(c in "/\\:" or not c.isprintable() for c in name):
        return "must have no slash, backslash, colon or control character"
    return f"must not be longer than {LONGEST} bytes" if len(name.encode()) > LONGEST else None


def check_plugin_name(kind: str, name: str) -> None:
    """Raise UsageError for a name that an algorithm or a reward cannot have.

    It stands in paths, in sums such as "clip:0.5+jpeg", and on the command line.
    """
    if not isinstance(name, str) or not _PLUGIN.fullmatch(name) or component_fault(name):
        raise UsageError(
            f"{kind} {name!r} cannot be called that: a name has letters, digits, '.', '_' and '-', and begins with a "
            "letter or digit; rename it"
        )


def _cut(text: str, length: int) -> str:
    """The beginning of a text in at most so many bytes."""
    return text.encode()[:length].decode(errors="ignore")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
