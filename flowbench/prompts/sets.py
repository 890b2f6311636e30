"""Prompt sets: built-in ones, a folder with a file per split, or a single file that is cut into train and test."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowbench.errors import UsageError, did_you_mean
from flowbench.files import write_atomically
from flowbench.prompts.prompt import Prompt
from flowbench.prompts.readers import EXPECTED, read_prompts

logger = logging.getLogger("flowbench")

FOLDER = Path(__file__).parent
TRAIN, TEST, DEV = "train", "test", "dev"
TEST_SHARE = 5  # one prompt in so many of a single file is a test prompt
TEST_LEAST = 2


@dataclass(frozen=True)
class PromptSplit:
    """One split of a prompt set; sha256 is its file's. file: where it stands, if it is the whole of a file."""

    name: str
    prompts: tuple[Prompt, ...]
    sha256: str
    file: Path | None = None


def prompt_sets() -> list[str]:
    """Names of the built-in prompt sets."""
    return sorted(p.name for p in FOLDER.iterdir() if (p / "train.tsv").is_file())


def locate(prompt_set: str, folder: Path | None = None) -> str:
    """What names a prompt set from anywhere: a built-in set's name, or the absolute path of a folder or file.

    A relative path is looked for in `folder`, if given, then in the current one.
    Raises UsageError when there is neither.
    """
    if prompt_set in prompt_sets():
        return prompt_set
    for place in (folder, Path()):
        if place is not None and prompt_set and os.path.exists(place / prompt_set):
            return str((place / prompt_set).resolve())
    hint = did_you_mean(prompt_set, prompt_sets())
    raise UsageError(f"unknown prompt set '{prompt_set}', and there is no folder or file of that name{hint}")


def split_files(folder: Path) -> dict[str, Path]:
    """The file of each split in a prompt set's folder.

    Raises UsageError when two files are of one split.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in EXPECTED or not path.is_file() or path.name.startswith("."):
            continue
        if path.stem in files:
            both = f"{files[path.stem].name} and {path.name}"
            raise UsageError(f"'{folder}' has two files of split '{path.stem}', {both}; keep one of them")
        files[path.stem] = path
    return files


def splits(folder: Path) -> list[str]:
    """Names of the splits in a prompt set's folder."""
    return sorted(split_files(folder))


def available_splits(prompt_set: str) -> list[str]:
    """Names of a prompt set's splits.

    Raises UsageError for an unknown set.
    """
    place = _place(prompt_set)
    return [TEST, TRAIN] if place.is_file() else splits(place)


def load_split(prompt_set: str, split: str) -> PromptSplit:
    """A split of a built-in set, of a folder with a file per split, or of a single file as `cut` cuts it.

    Raises UsageError for an unknown set or split, and for a file that `read_prompts` refuses.
    """
    place = _place(prompt_set)
    if place.is_file():
        halves = {half.name: half for half in cut(place)}
        if split not in halves:
            raise UsageError(f"prompt file '{prompt_set}' is cut into train and test and has no split '{split}'")
        return halves[split]
    files = split_files(place)
    if split not in files:
        raise UsageError(f"prompt set '{prompt_set}' has no split '{split}'{did_you_mean(split, files)}")
    return whole_file(files[split])


def whole_file(path: Path) -> PromptSplit:
    """All prompts of a file as one split, named by the file's stem."""
    prompts = read_prompts(path)
    return PromptSplit(path.stem, prompts, hashlib.sha256(path.read_bytes()).hexdigest(), path)


def cut(path: Path) -> tuple[PromptSplit, PromptSplit]:
    """Train and test of a single file: about a fifth of its different texts, chosen by their hash, are test.

    A text's side does not depend on the others, except that at least two texts are test, and one is train.
    Raises UsageError when there are fewer than three.
    """
    prompts = read_prompts(path)
    order = sorted(dict.fromkeys(p.text for p in prompts), key=_digest)
    if len(order) <= TEST_LEAST:
        raise UsageError(
            f"{path} has {len(order)} different prompts; to train on a file and to test on others takes at least "
            f"{TEST_LEAST + 1}"
        )
    chosen = sum(int(_digest(text), 16) % TEST_SHARE == 0 for text in order)
    order.sort(key=lambda text: int(_digest(text), 16) % TEST_SHARE != 0)
    test = set(order[: min(max(chosen, TEST_LEAST), len(order) - 1)])
    halves = {
        TRAIN: tuple(p for p in prompts if p.text not in test),
        TEST: tuple(p for p in prompts if p.text in test),
    }
    train, tested = (PromptSplit(name, half, _content_hash(half)) for name, half in halves.items())
    return train, tested


def present_splits(prompt_set: str, wanted: Sequence[str]) -> tuple[str, ...]:
    """Those of the wanted splits that a set has; says which it lacks.

    Raises UsageError when it has none of them.
    """
    known = available_splits(prompt_set)
    present = tuple(name for name in wanted if name in known)
    lacking = ", ".join(f"'{name}'" for name in wanted if name not in known)
    if not present:
        raise UsageError(
            f"prompts '{prompt_set}' have no split {lacking} to evaluate on; there are: {', '.join(known) or 'none'}; "
            "choose with --set evaluation.splits=[...]"
        )
    if lacking:
        logger.warning("prompts '%s' have no split %s; evaluated on: %s", prompt_set, lacking, ", ".join(present))
    return present


@dataclass(frozen=True)
class PromptChoice:
    """What a run's prompts are. prompt_set: as `locate` names it, None for the model's own; splits: those evaluated.

    content_hash: over the splits used; None for a built-in set that is the model's own.
    """

    prompt_set: str | None
    splits: tuple[str, ...]
    content_hash: str | None


def choose_prompts(given: str | None, own: str, wanted: tuple[str, ...], explicit: bool) -> PromptChoice:
    """The prompts of a run: the given set in place of the model's own, evaluated on the wanted splits.

    Splits that the given set lacks are left out with a word, unless they were asked for explicitly.
    Raises UsageError for an unknown set or split, a file that cannot be read, or splits that are the same.
    """
    other = None if given is None or (located := locate(given)) == own else located
    evaluated = wanted if other is None or explicit else present_splits(other, wanted)
    prompt_set = other or own
    if other is None and prompt_set in prompt_sets():
        return PromptChoice(None, evaluated, None)
    loaded = [load_split(prompt_set, name) for name in (TRAIN, *evaluated)]
    aside = [load_split(prompt_set, DEV)] if DEV in available_splits(prompt_set) else []
    check_distinct(prompt_set, [*loaded, *aside])
    return PromptChoice(other, evaluated, content_hash(loaded))


def check_distinct(prompt_set: str, loaded: Sequence[PromptSplit]) -> None:
    """Raise UsageError for two splits with the same prompts: one would say nothing that the other does not."""
    by_name = {split.name: frozenset(p.text for p in split.prompts) for split in loaded}
    for one, other in itertools.combinations(by_name, 2):
        if by_name[one] == by_name[other]:
            raise UsageError(
                f"splits '{one}' and '{other}' of prompts '{prompt_set}' are the same prompts; change one of them, or "
                f"leave it out with --set evaluation.splits=[...]"
            )


def content_hash(loaded: Iterable[PromptSplit]) -> str:
    """64 hex digits over the content of splits, wherever they lie."""
    content = {split.name: split.sha256 for split in loaded}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def spread(split: PromptSplit, count: int) -> tuple[Prompt, ...]:
    """At most `count` prompts of a split, taken in turn from its categories, always the same ones."""
    categories = list(dict.fromkeys(p.category for p in split.prompts))
    pools = [[p for p in split.prompts if p.category == c] for c in categories]
    turns = [pool[i] for i in range(max(map(len, pools))) for pool in pools if i < len(pool)]
    return tuple(turns[:count])


def save_split(split: PromptSplit, folder: Path, with_references: bool) -> None:
    """Write a split to FOLDER/<split>.<suffix>, from where `load_split` reads the same prompts.

    A file without reference images is copied as it is. Reference images are copied too if `with_references`, and
    otherwise named by their absolute paths.
    """
    references = list(dict.fromkeys(p.reference for p in split.prompts if p.reference))
    if split.file and not references:
        write_atomically(folder / f"{split.name}{split.file.suffix.lower()}", split.file.read_bytes())
        return
    names = {path: str(path) for path in references}
    if with_references:
        for k, path in enumerate(references):
            names[path] = f"references/{split.name}-{k}{path.suffix}"
            write_atomically(folder / names[path], path.read_bytes())
    write_atomically(folder / f"{split.name}.jsonl", _json_lines(split.prompts, names))


def _place(prompt_set: str) -> Path:
    located = locate(prompt_set)
    return Path(located) if Path(located).is_absolute() else FOLDER / located


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _content_hash(prompts: Sequence[Prompt]) -> str:
    """As of the file that `save_split` would write, with the reference images' names for their paths."""
    names = {p.reference: p.reference.name for p in prompts if p.reference}
    return _digest(_json_lines(prompts, names))


def _json_lines(prompts: Sequence[Prompt], names: Mapping[Path, str]) -> str:
    """One object a line that `read_prompts` reads back; names: how reference images are spelled."""
    lines = []
    for p in prompts:
        reference = {"reference": names[p.reference]} if p.reference else {}
        lines.append(json.dumps({"prompt": p.text, "category": p.category, **p.metadata, **reference}))
    return "".join(line + "\n" for line in lines)
