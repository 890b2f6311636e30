"""Prompt sets: a folder per set, a tab-separated file (category, prompt) per split, under version control."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from flowbench.errors import UsageError, did_you_mean

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Prompt:
    """One prompt and its category."""

    text: str
    category: str


@dataclass(frozen=True)
class PromptSplit:
    """One split of a prompt set; sha256 is its file's."""

    name: str
    prompts: tuple[Prompt, ...]
    sha256: str


def prompt_sets() -> list[str]:
    """Names of the built-in prompt sets."""
    return sorted(p.name for p in FOLDER.iterdir() if (p / "train.tsv").is_file())


def load_split(prompt_set: str, split: str) -> PromptSplit:
    """A split of a built-in set, or of a folder of .tsv files.

    Raises UsageError for an unknown set or split, or a line without a tab.
    """
    folder = Path(prompt_set) if Path(prompt_set).is_dir() else FOLDER / prompt_set
    if not folder.is_dir():
        raise UsageError(f"unknown prompt set '{prompt_set}'{did_you_mean(prompt_set, prompt_sets())}")
    path = folder / f"{split}.tsv"
    if not path.is_file():
        raise UsageError(f"prompt set '{prompt_set}' has no split '{split}'{did_you_mean(split, splits(folder))}")
    content = path.read_bytes()
    prompts = []
    for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
        category, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise UsageError(f"{path} line {number} is not 'category<TAB>prompt'")
        prompts.append(Prompt(text.strip(), category))
    return PromptSplit(split, tuple(prompts), hashlib.sha256(content).hexdigest())


def splits(folder: Path) -> list[str]:
    """Names of the splits in a prompt set's folder."""
    return sorted(p.stem for p in folder.glob("*.tsv"))


def spread(split: PromptSplit, count: int) -> tuple[Prompt, ...]:
    """At most `count` prompts of a split, taken in turn from its categories, always the same ones."""
    categories = list(dict.fromkeys(p.category for p in split.prompts))
    pools = [[p for p in split.prompts if p.category == c] for c in categories]
    turns = [pool[i] for i in range(max(map(len, pools))) for pool in pools if i < len(pool)]
    return tuple(turns[:count])
