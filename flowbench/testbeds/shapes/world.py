"""The world of shapes: scenes, captions, and a vectorised anti-aliased renderer.

A scene is one to four objects on a grey background of 32 x 32 pixels. A caption states some of it; all that it
leaves unsaid (positions, sizes, colours, the grey) varies freely, which is what diversity within a prompt measures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

IMAGE_SIZE = 32
MAX_OBJECTS = 4
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"two": 2, "three": 3, "four": 4}
CATEGORIES = ("single", "two", "counting", "colors", "position", "binding")
PALETTE = np.array(
    [
        [0.86, 0.12, 0.14],
        [0.13, 0.66, 0.22],
        [0.16, 0.30, 0.90],
        [0.96, 0.88, 0.15],
        [0.55, 0.18, 0.72],
        [0.97, 0.52, 0.08],
    ],
    dtype=np.float32,
)
RADII = {"small": (3.4, 3.9), "large": (5.3, 6.0)}  # pixels, uniform within the range
# Objects stand near the places of a coarse lattice. Places anywhere made the base model need several times the training
# to draw clean shapes; the lattice keeps nine places, sizes, colours and the sub-pixel jitter as free variation.
LATTICE = (7.5, 16.0, 24.5)  # pixels, along each axis
JITTER = 1.0
SIZE_BOUNDARY = 4.6  # radius in pixels that separates small from large

# Colour-shape pairs, and pairings of two of the other pairs, that no pre-training caption and no RL prompt contains.
HELD_OUT_PAIRS = frozenset({("purple", "circle"), ("orange", "square"), ("green", "triangle"), ("blue", "cross")})


@dataclass(frozen=True)
class ObjectSpec:
    """What a caption says about one object; None is unsaid."""

    shape: str
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Caption:
    """A caption with its meaning: the objects that must be there, and no others.

    `relation` holds between objects[0] and objects[1].
    """

    text: str
    category: str
    objects: tuple[ObjectSpec, ...]
    relation: str | None = None


@dataclass(frozen=True)
class Scenes:
    """A batch of N scenes. Slots beyond a scene's number of objects have shape -1.

    shape, color (N, 4) int64 indices into SHAPES and COLORS; radius, x, y (N, 4) float32 in pixels, x to the right
    and y downwards; background (N,) float32 grey in [0, 1].
    """

    shape: np.ndarray
    color: np.ndarray
    radius: np.ndarray
    x: np.ndarray
    y: np.ndarray
    background: np.ndarray

    def __len__(self) -> int:
        return len(self.background)


def held_out_pairing(first: ObjectSpec, second: ObjectSpec) -> bool:
    """True for the tenth of the pairings of two fully named objects that is kept for the compositional split."""
    if first.color is None or second.color is None:
        return False
    low, high = sorted(COLORS.index(o.color or "") * 4 + SHAPES.index(o.shape) for o in (first, second))
    return low != high and (low * 31 + high * 17) % 10 == 0


def is_compositional(caption: Caption) -> bool:
    """True when the caption has a held-out colour-shape pair or a held-out pairing."""
    if any((o.color, o.shape) in HELD_OUT_PAIRS for o in caption.objects):
        return True
    distinct = len(caption.objects) == 2 and caption.objects[0] != caption.objects[1]
    return distinct and held_out_pairing(*caption.objects)


def _phrase(spec: ObjectSpec) -> str:
    words = [w for w in (spec.size, spec.color, spec.shape) if w]
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def describe(category: str, objects: tuple[ObjectSpec, ...], relation: str | None = None) -> Caption:
    """The caption that says these objects, in the one grammar of this world."""
    if category == "counting":
        number = next(word for word, n in COUNTS.items() if n == len(objects))
        text = " ".join([number, *([objects[0].color] if objects[0].color else []), _plural(objects[0].shape)])
    else:
        text = f" {relation or 'and'} ".join(_phrase(o) for o in objects)
    return Caption(text, category, objects, relation)


def all_captions() -> list[Caption]:
    """Every caption of the world, in a fixed order (3,084 of them)."""
    bare = [ObjectSpec(s) for s in SHAPES]
    sized = [ObjectSpec(s, None, z) for s, z in product(SHAPES, SIZES)]
    colored = [ObjectSpec(s, c) for s, c in product(SHAPES, COLORS)]
    full = [ObjectSpec(s, c, z) for s, c, z in product(SHAPES, COLORS, SIZES)]
    captions = [describe("single", (o,)) for o in bare + sized + full]
    captions += [describe("colors", (o,)) for o in colored]
    captions += [describe("two", (a, b)) for a, b in product(bare, bare) if a != b]
    captions += [
        describe("two", pair) for a, b in product(colored, bare) if a.shape != b.shape for pair in ((a, b), (b, a))
    ]
    captions += [describe("counting", (o,) * n) for o, n in product(bare + colored, COUNTS.values())]
    pairs = [(a, b) for a, b in product(colored, colored) if a != b]
    captions += [describe("binding", p) for p in pairs]
    captions += [describe("position", p, r) for p, r in product(pairs, RELATIONS)]
    return captions


_OBJECT = rf"an? (?:(small|large) )?(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
_PATTERN = re.compile(rf"{_OBJECT}(?: (and|left of|right of|above|below) {_OBJECT})?")
_COUNTING = re.compile(rf"(two|three|four) (?:({'|'.join(COLORS)}) )?({'|'.join(_plural(s) for s in SHAPES)})")


def parse(text: str) -> Caption:
    """Read a caption of this world's grammar.

    Raises ValueError for a text that the grammar does not contain.
    """
    clean = " ".join(text.lower().rstrip(". ").split())
    if match := _COUNTING.fullmatch(clean):
        number, color, plural = match.groups()
        shape = next(s for s in SHAPES if _plural(s) == plural)
        return Caption(text, "counting", (ObjectSpec(shape, color),) * COUNTS[number])
    match = _PATTERN.fullmatch(clean)
    if not match:
        raise ValueError(
            f"the world of shapes cannot read the prompt {text!r}; write for example 'a red circle', "
            "'three green crosses' or 'a small red circle left of a blue square'"
        )
    size, color, shape, link, size_b, color_b, shape_b = match.groups()
    first = ObjectSpec(shape, color, size)
    if link is None:
        return Caption(text, "colors" if color and not size else "single", (first,))
    second = ObjectSpec(shape_b, color_b, size_b)
    if link != "and":
        return Caption(text, "position", (first, second), link)
    return Caption(text, "binding" if color and color_b else "two", (first, second))


def relation_holds(relation: str, x: np.ndarray, y: np.ndarray, margin: float = 0.0) -> bool:
    """Whether object 0 stands in `relation` to object 1: along the dominant axis, by more than `margin` pixels."""
    dx, dy = float(x[1] - x[0]), float(y[1] - y[0])
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > abs(across) + margin


def sample_scenes(captions: list[Caption], rng: np.random.Generator) -> Scenes:
    """Draw one scene per caption, uniformly over what the caption leaves unsaid.

    Objects never overlap, touch each other or touch the border; a draw that does not fit is drawn again.
    """
    n = len(captions)
    shape = np.full((n, MAX_OBJECTS), -1, dtype=np.int64)
    color_said, size_said = shape.copy(), shape.copy()
    for i, caption in enumerate(captions):
        for j, spec in enumerate(caption.objects):
            shape[i, j] = SHAPES.index(spec.shape)
            color_said[i, j] = COLORS.index(spec.color) if spec.color else -1
            size_said[i, j] = SIZES.index(spec.size) if spec.size else -1
    color = np.where(color_said >= 0, color_said, rng.integers(0, len(COLORS), shape.shape))
    background = np.where(rng.random(n) < 0.5, rng.uniform(0.04, 0.24, n), rng.uniform(0.76, 0.96, n))
    radius, x, y = (np.zeros(shape.shape, dtype=np.float32) for _ in range(3))
    todo = np.arange(n)
    while len(todo):
        r, px, py = _draw_layout(shape[todo], size_said[todo], rng)
        fits = _fits(shape[todo], r, px, py)
        for k in np.flatnonzero(fits):
            relation = captions[todo[k]].relation
            fits[k] = relation is None or relation_holds(relation, px[k], py[k], margin=2.0)
        done = todo[fits]
        radius[done], x[done], y[done] = r[fits], px[fits], py[fits]
        todo = todo[~fits]
    return Scenes(shape, color, radius, x, y, background.astype(np.float32))


def _draw_layout(shape: np.ndarray, size_said: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Radii and centres: a place of a coarse lattice, moved by up to JITTER pixels, kept inside the picture."""
    size = np.where(size_said >= 0, size_said, rng.integers(0, 2, shape.shape))
    low = np.array([RADII[s][0] for s in SIZES])[size]
    high = np.array([RADII[s][1] for s in SIZES])[size]
    radius = rng.uniform(low, high).astype(np.float32)
    reach = 1.22 * radius + 0.5
    x, y = (
        np.clip(
            rng.choice(LATTICE, shape.shape) + rng.uniform(-JITTER, JITTER, shape.shape), reach, IMAGE_SIZE - reach
        ).astype(np.float32)
        for _ in range(2)
    )
    return radius, x, y


def _fits(shape: np.ndarray, radius: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    ok = np.ones(len(shape), dtype=bool)
    for a in range(MAX_OBJECTS):
        for b in range(a):
            present = (shape[:, a] >= 0) & (shape[:, b] >= 0)
            apart = np.maximum(abs(x[:, a] - x[:, b]), abs(y[:, a] - y[:, b])) > radius[:, a] + radius[:, b] + 1.6
            ok &= ~present | apart
    return ok


def signed_distance(shape: int, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Approximate signed distance in pixels to one shape's outline, negative inside; arguments broadcast."""
    if SHAPES[shape] == "circle":
        return np.sqrt(dx * dx + dy * dy) - radius
    if SHAPES[shape] == "square":
        return np.maximum(abs(dx), abs(dy)) - 0.92 * radius
    if SHAPES[shape] == "triangle":  # equilateral, point upwards, centred on its centroid
        inner = 0.62 * radius
        return np.maximum(dy - inner, 0.8660254 * abs(dx) - 0.5 * dy - inner)
    arm = 0.36 * radius  # cross: the union of two bars
    ax, ay = abs(dx), abs(dy)
    return np.minimum(np.maximum(ax - arm, ay - radius), np.maximum(ay - arm, ax - radius))


def coverage(shape: int, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Anti-aliased share of each pixel that the shape covers, in [0, 1]."""
    return np.clip(0.5 - signed_distance(shape, dx, dy, radius), 0.0, 1.0)


_CENTERS = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5


def render(scenes: Scenes) -> np.ndarray:
    """Images (N, 3, 32, 32) float32 in [0, 1]."""
    images = np.broadcast_to(scenes.background[:, None, None, None], (len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE)).copy()
    for slot, kind in product(range(MAX_OBJECTS), range(len(SHAPES))):
        rows = np.flatnonzero(scenes.shape[:, slot] == kind)
        if not len(rows):
            continue
        dx = _CENTERS[None, None, :] - scenes.x[rows, slot, None, None]
        dy = _CENTERS[None, :, None] - scenes.y[rows, slot, None, None]
        alpha = coverage(kind, dx, dy, scenes.radius[rows, slot, None, None])[:, None]
        paint = PALETTE[scenes.color[rows, slot]][:, :, None, None]
        images[rows] += alpha * (paint - images[rows])
    return images


def mutate(caption: Caption, rng: np.random.Generator) -> Caption:
    """The caption with one said attribute changed, so that no scene of the one is a scene of the other."""
    objects, category, relation = list(caption.objects), caption.category, caption.relation
    if category == "counting":
        spec, kinds = objects[0], ["count", "shape"] + (["color"] if objects[0].color else [])
        kind = kinds[rng.integers(len(kinds))]
        if kind == "count":
            other = [n for n in COUNTS.values() if n != len(objects)]
            return describe(category, (spec,) * int(other[rng.integers(len(other))]))
        return describe(category, (_change(spec, kind, rng),) * len(objects))
    index = int(rng.integers(len(objects)))
    kinds = [k for k in ("shape", "color", "size") if getattr(objects[index], k)] + (["relation"] if relation else [])
    kind = kinds[rng.integers(len(kinds))]
    if kind == "relation":
        others = [r for r in RELATIONS if r != relation]
        return describe(category, tuple(objects), others[rng.integers(len(others))])
    objects[index] = _change(objects[index], kind, rng)
    changed = describe(category, tuple(objects), relation)
    # "a circle and a square" may become "a circle and a circle", but never the same two objects in another order.
    return changed if set(changed.objects) != set(caption.objects) or relation else mutate(caption, rng)


def _change(spec: ObjectSpec, kind: str, rng: np.random.Generator) -> ObjectSpec:
    values: tuple[str, ...] = {"shape": SHAPES, "color": COLORS, "size": SIZES}[kind]
    others = [v for v in values if v != getattr(spec, kind)]
    return replace(spec, **{kind: others[rng.integers(len(others))]})
