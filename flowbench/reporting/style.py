"""One look for every picture: colours, marks, sizes, light and dark, labels at the lines' ends, captions.

Colours are those of Okabe and Ito (2008), which colour-blind people tell apart, one per family of methods; within a
family a method has a marker and a line style of its own. Both depend on its name alone, so that it looks the same in
every picture, page and terminal. This module is cheap to import; matplotlib comes with the first figure.
"""

from __future__ import annotations

import logging
import textwrap
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from flowbench.errors import UsageError
from flowbench.files import write_atomically
from flowbench.registry import OTHER, algorithms
from flowbench.reporting.escape import plain

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger("flowbench")

FULL, HALF = 7.0, 3.4  # widths in inches
TEXT, DPI = 9.0, 200
DIRECT_LABELS = 6  # more lines than these have a legend

COLORS = {
    "forward-process": "#0072B2",
    "policy-gradient": "#D55E00",
    "reward-gradient": "#009E73",
    "preference": "#CC79A7",
    OTHER: "#E69F00",
}

Dashes: TypeAlias = "str | tuple[float, tuple[float, ...]]"

# matplotlib's marker, the same for a terminal, line style
_SHAPES: tuple[tuple[str, str, Dashes], ...] = (
    ("o", "●", "-"),
    ("s", "■", (0.0, (5.0, 1.5))),
    ("^", "▲", (0.0, (1.0, 1.2))),
    ("D", "◆", (0.0, (6.0, 1.5, 1.0, 1.5))),
    ("v", "▼", (0.0, (3.0, 1.0, 1.0, 1.0, 1.0, 1.0))),
    ("P", "✚", (0.0, (8.0, 2.0))),
    ("*", "★", (0.0, (3.0, 3.0))),
    ("<", "◀", (0.0, (5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0))),
    (">", "▶", (0.0, (1.0, 3.0))),
    ("X", "✖", (0.0, (8.0, 1.5, 2.0, 1.5))),
    ("p", "⬟", (0.0, (2.0, 1.0))),
    ("h", "⬢", (0.0, (4.0, 4.0))),
)
# Places of the built-in methods within their family, so that another method never changes how these look.
_PLACES = {
    **{name: k for k, name in enumerate(("acflow", "adrpo", "awm", "nft", "orw-cfm-w2", "raft"))},
    **{name: k for k, name in enumerate(("ddpo", "dpok", "flow-grpo"))},
    **{name: k for k, name in enumerate(("draft", "refl"))},
    "online-dpo": 0,
}
_TAKEN = 1 + max(_PLACES.values())


@dataclass(frozen=True)
class Mark:
    """How one method looks. marker and dashes as matplotlib takes them; glyph: the marker in a terminal."""

    color: str
    marker: str
    dashes: Dashes
    glyph: str


@dataclass(frozen=True)
class Theme:
    """A light or dark ground. ink: text and axes; grid: thin lines; base: the base model; truth: what is known."""

    name: str
    ink: str
    grid: str
    base: str
    truth: str
    ground: str


LIGHT = Theme("light", ink="#1a1a1a", grid="#dddddd", base="#767676", truth="#000000", ground="#ffffff")
DARK = Theme("dark", ink="#ececec", grid="#3d3d3d", base="#a0a0a0", truth="#ffffff", ground="#121212")


def family_of(algorithm: str) -> str:
    """The family that an algorithm declares; "other" for one that is not installed or cannot be imported."""
    if _only_own.get() and not is_own(algorithm):
        return OTHER
    return _family(algorithm, algorithm in algorithms.loaded)


def is_own(algorithm: str) -> bool:
    """Whether an algorithm is flowbench's own."""
    return algorithm in algorithms.names() and algorithms.module(algorithm).startswith("flowbench.")


_only_own: ContextVar[bool] = ContextVar("only_own", default=False)


@contextmanager
def only_own_families() -> Iterator[None]:
    """Inside, algorithms of other packages are of family "other", whether or not they are installed here."""
    token = _only_own.set(True)
    try:
        yield
    finally:
        _only_own.reset(token)


@cache
def _family(algorithm: str, loaded: bool) -> str:
    """As `family_of`, remembered until a plug-in of that name is loaded."""
    if algorithm not in algorithms.names():
        return OTHER
    try:
        return algorithms.describe(algorithm).family
    except UsageError:
        return OTHER


def mark(algorithm: str, family: str | None = None) -> Mark:
    """The look of an algorithm, from its name and family (None: what it declares)."""
    place = _PLACES.get(algorithm)
    if place is None:
        place = _TAKEN + zlib.crc32(algorithm.encode("utf-8", "replace")) % (len(_SHAPES) - _TAKEN)
    return _mark(COLORS.get(family or family_of(algorithm), COLORS[OTHER]), place)


def variant_mark(place: int, theme: Theme) -> Mark:
    """The look of the variants of one method, by their place; the first, the default, has the colour of text."""
    colors = (theme.ink, *COLORS.values())
    return _mark(colors[place % len(colors)], place)


def _mark(color: str, place: int) -> Mark:
    marker, glyph, dashes = _SHAPES[place % len(_SHAPES)]
    return Mark(color, marker, dashes, glyph)


@contextmanager
def applied(theme: Theme = LIGHT) -> Iterator[None]:
    """matplotlib's settings for figures that are made and saved inside."""
    import matplotlib

    with matplotlib.rc_context(_settings(theme)):
        yield


def _settings(theme: Theme) -> Any:
    names = ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color")
    sizes = ("font.size", "axes.labelsize", "axes.titlesize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    clear = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    return {
        **dict.fromkeys(names, theme.ink),
        **dict.fromkeys((*sizes, "figure.titlesize"), TEXT),
        **dict.fromkeys(clear, "none"),
        "legend.frameon": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.4,
        "lines.markersize": 4,
        "text.parse_math": False,  # prompts and names may hold dollar signs
        "figure.dpi": DPI,
        "savefig.dpi": DPI,
        "svg.fonttype": "none",  # text stays text: small, and found by a search
        "svg.hashsalt": "flowbench",
        "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    }


def figure(width: float, height: float, fitted: bool = True) -> Figure:
    """An empty figure of a size in inches, fitted to its labels unless told; for builders of `save`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained" if fitted else None)


Build: TypeAlias = "Callable[[Theme], Figure]"


def save(
    path: Path, build: Build, theme: Theme = LIGHT, *, transparent: bool = False, alt: str = "", also: str = ""
) -> Path:
    """Draw one picture and write it in the format that the path's ending names (PNG if none); returns the path.

    transparent: without the theme's ground, for pages that have their own. alt: what the picture says, in words; a file
    carries it as its description. also: the ending of a second format, beside the first one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with applied(theme):
        drawn = build(theme)
        _write(drawn, path, theme, transparent, alt)
        if also:
            drawn.set_layout_engine("none")  # it has its layout, which takes as long as drawing
            _write(drawn, path.with_suffix(f".{also}"), theme, transparent, alt)
    return path


@contextmanager
def drawing(what: str) -> Iterator[None]:
    """Within it, a picture that cannot be drawn is left out with a warning: no result is lost for one."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a font, a text or the disk: whatever it is, the numbers are there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("pictures %s cannot be drawn and are left out: %s", what, reason)


def save_variants(stem: Path, build: Build, alt: str = "") -> list[Path]:
    """A picture for pages and papers: STEM.png, STEM.svg, STEM-dark.png and STEM-dark.svg, on transparent ground."""
    written = []
    for theme, ending in ((LIGHT, ""), (DARK, "-dark")):
        path = stem.with_name(f"{stem.name}{ending}.png")
        save(path, build, theme, transparent=True, alt=alt, also="svg")
        written += [path, path.with_suffix(".svg")]
    return written


def _write(drawn: Figure, path: Path, theme: Theme, transparent: bool, alt: str) -> None:
    kind = path.suffix.lstrip(".").lower() or "png"
    described: dict[str, Any] = {"svg": {"Date": None, "Description": plain(alt)}, "png": {"Description": plain(alt)}}
    ground = "none" if transparent else theme.ground
    write_atomically(
        path, lambda place: drawn.savefig(place, format=kind, facecolor=ground, metadata=described.get(kind))
    )


def label_lines(axis: Axes, ends: Mapping[str, tuple[float, float]], colors: Mapping[str, str]) -> None:
    """Name each line at its right end (x, y), moved apart where labels would meet; a legend for more than six."""
    if len(ends) > DIRECT_LABELS or not ends:
        if ends:
            axis.legend(loc="best", ncols=2)
        return
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    gap = (high - low) * (TEXT + 2) / 72 / max(axis.get_window_extent().height / axis.figure.dpi, 0.5)
    placed = spaced([y for _, y in ends.values()], gap)
    for (name, (x, y)), at in zip(ends.items(), placed, strict=True):
        moved = abs(at - y) > gap / 4
        line = {
            "arrowstyle": "-",
            "color": colors[name],
            "linewidth": 0.6,
            "relpos": (0, 0.5),
            "shrinkA": 0,
            "shrinkB": 2,
        }
        axis.annotate(
            plain(name),
            (x, y),
            xytext=(x + (right - left) * (0.05 if moved else 0.02), at),
            va="center",
            annotation_clip=False,
            arrowprops=line if moved else None,
        )


def spaced(values: Sequence[float], gap: float) -> list[float]:
    """The values, moved as little as keeps them at least `gap` apart and in order."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[tuple[list[int], float]] = []  # members, and the centre of their places
    for i in order:
        members, centre = [i], values[i]
        while groups and centre - gap * (len(members) - 1) / 2 < groups[-1][1] + gap * (len(groups[-1][0]) + 1) / 2:
            members = groups.pop()[0] + members
            centre = sum(values[j] for j in members) / len(members)
        groups.append((members, centre))
    placed = [0.0] * len(values)
    for members, centre in groups:
        for k, i in enumerate(members):
            placed[i] = centre + gap * (k - (len(members) - 1) / 2)
    return placed


def band(axis: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, color: str) -> None:
    """A band around a line; the caption must say what it is."""
    axis.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def caption(drawn: Figure, text: str) -> None:
    """A line below a figure: what a band is, what a picture rests on."""
    width = int(drawn.get_figwidth() * 72 / (TEXT * 0.52))
    drawn.supxlabel("\n".join(textwrap.wrap(plain(text), width)), x=0.01, ha="left", fontsize=TEXT - 1)


def wrap(text: str, width: int, lines: int = 2) -> str:
    """Foreign text on at most so many lines of so many characters, with an ellipsis where more is left."""
    parts = textwrap.wrap(plain(text), width, break_long_words=True)
    if len(parts) <= lines:
        return "\n".join(parts)
    return "\n".join([*parts[: lines - 1], parts[lines - 1][: width - 1].rstrip() + "…"])
