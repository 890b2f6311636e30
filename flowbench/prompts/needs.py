"""Whether prompts have what a reward declares that it needs of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flowbench.errors import UsageError
from flowbench.prompts.prompt import Prompt
from flowbench.prompts.sets import TRAIN, PromptSplit, load_split
from flowbench.registry import RewardInfo


def lacking(info: RewardInfo, prompt: Prompt) -> str | None:
    """The first thing that the reward needs and the prompt lacks, in words; a value of null is none."""
    for key in info.needs_metadata:
        value = prompt.category or None if key == "category" else prompt.metadata.get(key)
        if value is None:
            return f"'{key}'"
    return "a reference image" if info.needs_reference and prompt.reference is None else None


def unmet(info: RewardInfo, prompt_set: str, splits: Iterable[PromptSplit]) -> str | None:
    """In one line, the first prompt of these splits that lacks what the reward needs; None if there is none."""
    if not info.needs_metadata and not info.needs_reference:
        return None
    for split in splits:
        for prompt in split.prompts:
            if what := lacking(info, prompt):
                return (
                    f"it needs {what} of every prompt; split '{split.name}' of '{prompt_set}' has none for {prompt!r}"
                )
    return None


def check_needs(infos: Sequence[RewardInfo], prompt_set: str, splits: Sequence[PromptSplit]) -> None:
    """Raise UsageError, naming reward, key, split and prompt, where prompts lack what one of the rewards needs."""
    for info in infos:
        if fault := unmet(info, prompt_set, splits):
            raise UsageError(f"reward '{info.name}' cannot score these prompts: {fault}; choose others with --prompts")


def check_run(
    trained: Sequence[RewardInfo], judges: Sequence[RewardInfo], prompt_set: str, evaluated: Sequence[str]
) -> None:
    """Raise UsageError where a run's prompts lack what a reward trained on, or a judge that is named, needs.

    Judges see the evaluated splits alone. Nothing is read where nothing is needed.
    """
    if any(info.needs_metadata or info.needs_reference for info in (*trained, *judges)):
        splits = [load_split(prompt_set, name) for name in evaluated]
        check_needs(trained, prompt_set, [load_split(prompt_set, TRAIN), *splits])
        check_needs(judges, prompt_set, splits)
