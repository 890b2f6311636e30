"""The one printer of foreign text: names, prompts and messages of records and plug-ins, for every format.

A record may come from anybody. Whatever it calls itself, it is shown as text: it neither breaks a table nor commands a
terminal, a spreadsheet or a browser.
"""

from __future__ import annotations

import html as _html
import re
import unicodedata

# Other characters that end a line, and those that reorder the text around them ("Trojan source", CVE-2021-42574).
_UNSEEN = re.compile("[\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)", re.IGNORECASE)
# An underscore within a word is no markup.
_MARKDOWN = re.compile(r"([\\`*\[\]<>|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # else a row that begins with it would be an argument of the line break before
    "]": "{]}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    "…": r"\ldots{}",
    "∞": r"$\infty$",
}


def plain(text: str) -> str:
    """One line of printable text: white space is a space, a control character is shown as its code."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_printable, _UNSEEN.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)))


def _printable(character: str) -> str:
    if character.isspace():
        return " "
    return f"<U+{ord(character):04X}>" if unicodedata.category(character) in ("Cc", "Cs", "Co") else character


def terminal(text: str) -> str:
    """For rich's markup: brackets are brackets."""
    return re.sub(r"(\\*)(\[)", lambda found: found[1] * 2 + "\\[", plain(text)) + _final_backslash(text)


def _final_backslash(text: str) -> str:
    """A backslash at the end would escape the markup that follows."""
    return "\\" * ((len(text) - len(text.rstrip("\\"))) % 2)


def markdown(text: str) -> str:
    """For a cell of a Markdown table: no pipe, no markup, no HTML."""
    return _MARKDOWN.sub(r"\\\1", plain(text))


def csv(text: str) -> str:
    """For a cell of a CSV: a text that a spreadsheet would compute has an apostrophe before it; numbers have not."""
    shown = plain(text)
    return f"'{shown}" if shown.lstrip().startswith(_FORMULA) and not _NUMBER.fullmatch(shown) else shown


def latex(text: str) -> str:
    """For running text of LaTeX."""
    return "".join(_LATEX.get(character, character) for character in plain(text))


def html(text: str) -> str:
    """For HTML, between tags or in quotes."""
    return _html.escape(plain(text), quote=True)
