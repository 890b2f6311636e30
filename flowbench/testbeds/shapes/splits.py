"""Writes the prompt splits of the world of shapes; the files are under version control and change only on purpose."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from flowbench.testbeds.shapes.world import CATEGORIES, all_captions, is_compositional

TRAIN, TEST, COMPOSITIONAL = 60, 24, 24  # prompts per category at most
SEED = 7


def write_splits(folder: Path) -> None:
    """train.tsv, test.tsv (unseen prompts of seen combinations) and compositional.tsv (held-out combinations)."""
    rng = np.random.default_rng(SEED)
    lines: dict[str, list[str]] = {"train": [], "test": [], "compositional": []}
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
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in lines.items():
        (folder / f"{name}.tsv").write_text("\n".join(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_splits(Path(sys.argv[1]))
