"""Writes the prompt splits of the world of shapes; the files are under version control and change only on purpose.

`dev` came later than the others, which keep every byte: it is drawn, by a generator of its own, from the seen
combinations that `test` and `train` left over, whatever the order of their words ("a square and a circle" is taken
where "a circle and a square" is). They left none of single (52 captions), counting (72) and colors (20), so its 60
prompts are 9 of two, 26 of position and 25 of binding.
"""

from __future__ import annotations

import sys
from itertools import zip_longest
from pathlib import Path

import numpy as np

from flowbench.files import write_atomically
from flowbench.testbeds.shapes.world import CATEGORIES, Caption, all_captions, is_compositional

TRAIN, TEST, COMPOSITIONAL = 60, 24, 24  # prompts per category at most
DEV = 60  # prompts in all, spread over the categories that have some left
SEED, DEV_SEED = 7, 8
OPPOSITE = {"right of": "left of", "below": "above"}


def write_splits(folder: Path) -> None:
    """train.tsv, test.tsv and dev.tsv (unseen prompts of seen combinations), compositional.tsv (held-out ones)."""
    rng, dev_rng = np.random.default_rng(SEED), np.random.default_rng(DEV_SEED)
    lines: dict[str, list[str]] = {"train": [], "test": [], "compositional": []}
    left: list[list[str]] = []
    for category in CATEGORIES:
        captions = [c for c in all_captions() if c.category == category]
        seen = [c for c in captions if not is_compositional(c)]
        held_out = [c for c in captions if is_compositional(c)]
        order = rng.permutation(len(seen))
        n_test = min(TEST, len(seen) // 3)
        lines["test"] += [f"{category}\t{seen[i].text}" for i in order[:n_test]]
        lines["train"] += [f"{category}\t{seen[i].text}" for i in order[n_test : n_test + TRAIN]]
        chosen = rng.permutation(len(held_out))[:COMPOSITIONAL]
        lines["compositional"] += [f"{category}\t{held_out[i].text}" for i in chosen]
        taken = {_meaning(seen[i]) for i in order[: n_test + TRAIN]}
        rest = [seen[i] for i in dev_rng.permutation(order[n_test + TRAIN :])]
        fresh = {_meaning(c): c for c in rest if _meaning(c) not in taken}
        left.append([f"{category}\t{c.text}" for c in fresh.values()])
    turns = [line for turn in zip_longest(*left) for line in turn if line is not None][:DEV]
    lines["dev"] = [line for pool in left for line in pool if line in turns]
    for name, content in lines.items():
        write_atomically(folder / f"{name}.tsv", "\n".join(content) + "\n")


def _meaning(caption: Caption) -> tuple[object, ...]:
    """What a caption says, however it is worded: equal for "a above b" and "b below a"."""
    if caption.relation is None:
        return tuple(sorted(caption.objects, key=str))
    turned = caption.relation in OPPOSITE
    return (OPPOSITE.get(caption.relation, caption.relation), *(caption.objects[::-1] if turned else caption.objects))


if __name__ == "__main__":
    write_splits(Path(sys.argv[1]))
