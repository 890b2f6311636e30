"""Writes the splits of the prompt set `objects`: everyday things in six categories, as compositional benchmarks have.

The files are under version control and change only on purpose.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np

from flowbench.files import write_atomically

TRAIN, TEST, COMPOSITIONAL = 50, 20, 16  # prompts per category
SEED = 11

THINGS = {  # with their plurals
    "apple": "apples",
    "backpack": "backpacks",
    "balloon": "balloons",
    "bench": "benches",
    "bicycle": "bicycles",
    "bird": "birds",
    "boat": "boats",
    "book": "books",
    "bottle": "bottles",
    "bowl": "bowls",
    "bus": "buses",
    "cake": "cakes",
    "candle": "candles",
    "car": "cars",
    "cat": "cats",
    "chair": "chairs",
    "clock": "clocks",
    "cup": "cups",
    "dog": "dogs",
    "flower": "flowers",
    "fork": "forks",
    "guitar": "guitars",
    "hat": "hats",
    "horse": "horses",
    "kettle": "kettles",
    "key": "keys",
    "lamp": "lamps",
    "mug": "mugs",
    "pillow": "pillows",
    "scarf": "scarves",
    "shoe": "shoes",
    "sofa": "sofas",
    "spoon": "spoons",
    "suitcase": "suitcases",
    "table": "tables",
    "teapot": "teapots",
    "train": "trains",
    "truck": "trucks",
    "umbrella": "umbrellas",
    "vase": "vases",
}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = ("two", "three", "four")
CATEGORIES = ("single", "two", "counting", "colors", "position", "binding")


@dataclass(frozen=True)
class Phrase:
    """A prompt, and whether it has a held-out pair or pairing."""

    text: str
    held_out: bool


def held_out_color(thing: str) -> str:
    """The one colour of this thing that no training or test prompt has."""
    return COLORS[3 * list(THINGS).index(thing) % len(COLORS)]


def held_out_pairing(first: str, second: str) -> bool:
    """True for the tenth of the pairings of two things that is kept for the compositional split."""
    low, high = sorted(list(THINGS).index(thing) for thing in (first, second))
    return (low * 31 + high * 17) % 10 == 0


def all_phrases(category: str) -> list[Phrase]:
    """Every prompt of a category, in a fixed order."""
    pairings = [(a, b, held_out_pairing(a, b)) for a, b in permutations(THINGS, 2)]
    if category == "single":
        plain = [Phrase(_a(thing), False) for thing in THINGS]
        sized = [Phrase(_a(f"{size} {thing}"), False) for thing, size in product(THINGS, SIZES)]
        # One seen and the held-out colour of each thing, so that plain prompts are not lost among coloured ones.
        colored = [
            Phrase(_a(f"{size} {color} {thing}"), color == held_out_color(thing))
            for thing, size in product(THINGS, SIZES)
            for color in (held_out_color(thing), COLORS[COLORS.index(held_out_color(thing)) - 1])
        ]
        return plain + sized + colored
    if category == "two":
        # One order of each pairing, not always the alphabetical one: the other order means the same.
        once = [(a, b) if k % 2 else (b, a) for k, (a, b) in enumerate(combinations(THINGS, 2))]
        return [Phrase(f"{_a(a)} and {_a(b)}", held_out_pairing(a, b)) for a, b in once]
    if category == "counting":
        plain = [Phrase(f"{n} {THINGS[thing]}", False) for thing, n in product(THINGS, COUNTS)]
        colored = [
            Phrase(f"{n} {color} {THINGS[thing]}", color == held_out_color(thing))
            for thing, n, color in product(THINGS, COUNTS, COLORS)
        ]
        return plain + colored
    if category == "colors":
        return [Phrase(_a(f"{c} {thing}"), c == held_out_color(thing)) for thing, c in product(THINGS, COLORS)]
    if category == "position":
        return [Phrase(f"{_a(a)} {relation} {_a(b)}", held) for (a, b, held), relation in product(pairings, RELATIONS)]
    return [
        Phrase(f"{_a(f'{c} {a}')} and {_a(f'{d} {b}')}", held or held_out_color(a) == c or held_out_color(b) == d)
        for (a, b, held), (c, d) in product(pairings, combinations(COLORS, 2))
    ]


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def write_splits(folder: Path) -> None:
    """train.tsv, test.tsv (unseen prompts of seen combinations) and compositional.tsv (held-out combinations)."""
    rng = np.random.default_rng(SEED)
    lines: dict[str, list[str]] = {"train": [], "test": [], "compositional": []}
    for category in CATEGORIES:
        phrases = all_phrases(category)
        seen, held_out = ([p for p in phrases if p.held_out == wanted] for wanted in (False, True))
        drawn = [seen[i] for i in rng.permutation(len(seen))[: TEST + TRAIN]]
        rare = [held_out[i] for i in rng.permutation(len(held_out))[:COMPOSITIONAL]]
        for name, chosen in (("test", drawn[:TEST]), ("train", drawn[TEST:]), ("compositional", rare)):
            lines[name] += [f"{category}\ta photo of {p.text}" for p in chosen]
    for name, content in lines.items():
        write_atomically(folder / f"{name}.tsv", "\n".join(content) + "\n")


if __name__ == "__main__":
    write_splits(Path(sys.argv[1]))
