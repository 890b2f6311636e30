"""The oracle: what a picture of the world of shapes shows, measured from its pixels alone.

Deterministic, no learned weights. `see` segments the picture by palette colour against the estimated background and
fits a template to every connected component; `judge` then checks a caption's conditions. Two scores per image:
`exact` (every condition holds) and `soft` (mean credit in [0, 1], continuous in the quality of the fits).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations

import numpy as np
from scipy import ndimage

from flowbench.testbeds.shapes.world import (
    COLORS,
    IMAGE_SIZE,
    PALETTE,
    RELATIONS,
    SHAPES,
    SIZE_BOUNDARY,
    SIZES,
    Caption,
    ObjectSpec,
    coverage,
)

MIN_CONTRAST = 0.22  # RGB distance from the background at full coverage below which a pixel is background
MIN_AREA = 6.0  # pixels of coverage; smaller components are specks, not objects
GOOD_FIT = 0.62  # intersection over union from which a component counts as its best-fitting shape
WINDOW = 9  # half-width in pixels of the window that templates are compared in


@dataclass(frozen=True)
class SeenObject:
    """One object found in a picture.

    fit: best intersection over union per shape, in SHAPES' order, in [0, 1]; shape and color are the best names;
    purity: how well the component's pixels agree with its palette colour, in [0, 1]; radius, x, y in pixels.
    """

    shape: str
    color: str
    fit: tuple[float, ...]
    purity: float
    radius: float
    x: float
    y: float

    @property
    def size(self) -> str:
        """The name of its size, by its radius."""
        return SIZES[int(self.radius > SIZE_BOUNDARY)]


@dataclass(frozen=True)
class View:
    """All that is in one picture: its objects, and the coverage in pixels that belongs to no object."""

    objects: tuple[SeenObject, ...]
    stray: float


@dataclass(frozen=True)
class Verdict:
    """exact: every condition of the caption holds; soft: mean credit over the conditions, in [0, 1]."""

    exact: bool
    soft: float


@dataclass(frozen=True)
class _Bank:
    shape: np.ndarray  # (T,) index into SHAPES
    radius: np.ndarray  # (T,) pixels
    offset: np.ndarray  # (T, 2) x and y of the centre within the window's middle pixel
    pixels: np.ndarray  # (T, P) coverage
    area: np.ndarray  # (T,)


@cache
def _template_bank() -> _Bank:
    grid = np.arange(-WINDOW, WINDOW + 1, dtype=np.float32)
    radii = np.arange(2.4, 7.41, 0.4, dtype=np.float32)
    shifts = np.arange(-1.0, 1.01, 0.4, dtype=np.float32)
    shape, radius, ox, oy = (a.ravel() for a in np.meshgrid(range(len(SHAPES)), radii, shifts, shifts, indexing="ij"))
    pixels = np.stack(
        [
            coverage(int(k), grid[None, :] - dx, grid[:, None] - dy, r).ravel()
            for k, r, dx, dy in zip(shape, radius, ox, oy, strict=True)
        ]
    ).astype(np.float32)
    return _Bank(shape.astype(int), radius, np.stack([ox, oy], axis=1), pixels, pixels.sum(1))


def see(images: np.ndarray) -> list[View]:
    """Look at images (N, 3, 32, 32), float in [0, 1].

    Raises ValueError for another shape.
    """
    if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"the oracle reads images of shape (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), got {images.shape}")
    color, alpha, residual = _segment(images)
    return [_view(c, a, r) for c, a, r in zip(color, alpha, residual, strict=True)]


def _segment(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best palette colour (-1 is background), its coverage, and the RGB distance left over; each (N, 32, 32).

    A pixel is modelled as background + alpha * (paint - background), so that anti-aliased edges keep their colour.
    """
    n = len(images)
    border = np.concatenate([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], axis=2)
    background = np.median(border, axis=2)  # (N, 3)
    delta = (images - background[:, :, None, None]).reshape(n, 3, -1).astype(np.float32)
    toward = PALETTE[None] - background[:, None]  # (N, 6, 3)
    alpha = np.einsum("nkc,ncp->nkp", toward, delta) / (toward**2).sum(2)[:, :, None]
    alpha = np.clip(alpha, 0.0, 1.0)
    residual = np.sqrt(((delta[:, None] - alpha[:, :, None] * toward[:, :, :, None]) ** 2).sum(2))
    best = residual.argmin(1)  # (N, P)
    take = np.take_along_axis
    alpha, residual = take(alpha, best[:, None], 1)[:, 0], take(residual, best[:, None], 1)[:, 0]
    contrast = np.sqrt((delta**2).sum(1))
    color = np.where((alpha >= 0.5) & (contrast > MIN_CONTRAST), best, -1)
    side = (n, IMAGE_SIZE, IMAGE_SIZE)
    return color.reshape(side), np.where(contrast > 0.1, alpha, 0.0).reshape(side), residual.reshape(side)


def _view(color: np.ndarray, alpha: np.ndarray, residual: np.ndarray) -> View:
    objects, stray = [], 0.0
    for k in np.unique(color[color >= 0]):
        labels, count = ndimage.label(color == k)
        for i in range(1, count + 1):
            mask = labels == i
            area = float(alpha[mask].sum())
            if area < MIN_AREA:
                stray += area
            else:
                objects.append(_fit(int(k), mask, alpha, residual))
    return View(tuple(objects), stray)


def _fit(color: int, mask: np.ndarray, alpha: np.ndarray, residual: np.ndarray) -> SeenObject:
    """Search the template, position and radius with the highest soft intersection over union."""
    bank = _template_bank()
    grown = ndimage.binary_dilation(mask)
    patch = np.where(mask, alpha, np.where(grown, np.minimum(alpha, 0.5), 0.0)).astype(np.float32)
    rows, cols = np.nonzero(mask)
    cy, cx = round(float(rows.mean())), round(float(cols.mean()))
    padded = np.pad(patch, WINDOW)
    window = padded[cy : cy + 2 * WINDOW + 1, cx : cx + 2 * WINDOW + 1].ravel()
    near = np.flatnonzero(abs(bank.area - window.sum()) < 0.45 * window.sum() + 4.0)
    near = near if len(near) else np.arange(len(bank.area))
    inside = np.flatnonzero(window)  # elsewhere nothing overlaps
    overlap = np.minimum(bank.pixels[np.ix_(near, inside)], window[inside]).sum(1)
    iou = overlap / (bank.area[near] + patch.sum() - overlap)
    fit = tuple(float(iou[bank.shape[near] == k].max(initial=0.0)) for k in range(len(SHAPES)))
    best = near[int(iou.argmax())]
    purity = float(np.clip(1.0 - residual[mask].mean() / 0.25, 0.0, 1.0))
    x, y = cx + 0.5 + float(bank.offset[best, 0]), cy + 0.5 + float(bank.offset[best, 1])
    name = SHAPES[int(np.argmax(fit))]
    return SeenObject(name, COLORS[color], fit, purity, float(bank.radius[best]), x, y)


def judge(view: View, caption: Caption) -> Verdict:
    """Check one view against one caption: the caption's objects and no others, with all that is said of them."""
    wanted, seen = caption.objects, view.objects
    if not seen:
        return Verdict(False, 0.0)
    best_credit, exact = 0.0, False
    slots: list[SeenObject | None] = [*seen, *[None] * (len(wanted) - len(seen))]
    table = {
        (spec, i): (_credit(spec, obj), _matches(spec, obj)) for spec in set(wanted) for i, obj in enumerate(slots)
    }
    # Interchangeable objects have the same credit in every order; a busy picture has too many orders to try.
    orders = combinations if len(set(wanted)) == 1 and not caption.relation else permutations
    for order in orders(range(len(slots)), len(wanted)):
        credit, match = zip(*(table[pair] for pair in zip(wanted, order, strict=True)), strict=True)
        total, holds = sum(credit), all(match)
        if caption.relation:
            related = _relation_credit(caption.relation, [slots[i] for i in order])
            total, holds = total + related * min(credit), holds and related > 0.5
        best_credit = max(best_credit, total / (len(credit) + bool(caption.relation)))
        exact = exact or (holds and len(seen) == len(wanted))
    surplus = max(0, len(seen) - len(wanted)) + min(view.stray / 20.0, 1.0)
    return Verdict(exact, best_credit * len(wanted) / (len(wanted) + surplus))


def _matches(spec: ObjectSpec, obj: SeenObject | None) -> bool:
    return (
        obj is not None
        and obj.shape == spec.shape
        and max(obj.fit) >= GOOD_FIT
        and spec.color in (None, obj.color)
        and spec.size in (None, obj.size)
    )


def _credit(spec: ObjectSpec, obj: SeenObject | None) -> float:
    """Credit in [0, 1] of one object for one specification: mean over what is said, scaled by how clean it is."""
    if obj is None:
        return 0.0
    wanted = obj.fit[SHAPES.index(spec.shape)]
    lead = wanted - max(f for k, f in enumerate(obj.fit) if SHAPES[k] != spec.shape)
    parts = [1.0 / (1.0 + np.exp(-lead / 0.02))]
    if spec.color:
        parts.append(float(spec.color == obj.color))
    if spec.size:
        sign = 1.0 if spec.size == "large" else -1.0
        parts.append(1.0 / (1.0 + np.exp(-sign * (obj.radius - SIZE_BOUNDARY) / 0.2)))
    clean = np.clip((max(obj.fit) - 0.3) / 0.6, 0.0, 1.0) * obj.purity
    return float(np.mean(parts) * clean)


def _relation_credit(relation: str, pair: list[SeenObject | None]) -> float:
    first, second = pair
    if first is None or second is None:
        return 0.0
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return float(1.0 / (1.0 + np.exp(-(along - abs(across)) / 0.8)))


def judge_images(images: np.ndarray, captions: list[Caption]) -> list[Verdict]:
    """Verdicts for images (N, 3, 32, 32) in [0, 1] and as many captions."""
    return [judge(view, caption) for view, caption in zip(see(images), captions, strict=True)]


__all__ = ["RELATIONS", "SeenObject", "Verdict", "View", "judge", "judge_images", "see"]
