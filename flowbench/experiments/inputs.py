"""What a run was made from, kept in its folder: the preset and the prompts, so that it can be looked at anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from flowbench.config import PRESET
from flowbench.files import write_atomically, write_folder
from flowbench.models.presets import ModelPreset, with_absolute_paths
from flowbench.prompts import PromptSplit, available_splits, load_split, save_split

PROMPTS = "prompts"


def keep_inputs(folder: Path, preset: ModelPreset, train: PromptSplit, evaluated: Sequence[PromptSplit]) -> None:
    """Write preset.yaml and prompts/<split>.<suffix> into a run folder, in place of what is there.

    Paths are absolute, but reference images of evaluated prompts are copied.
    """
    content = with_absolute_paths(preset, Path()).model_dump(mode="json")
    write_atomically(folder / PRESET, yaml.safe_dump(content, sort_keys=False))

    def save(place: Path) -> None:
        save_split(train, place, with_references=False)
        for split in evaluated:
            save_split(split, place, with_references=True)

    write_folder(folder / PROMPTS, save)


def kept_split(folder: Path, prompt_set: str, name: str) -> PromptSplit:
    """A split of a run's prompts: its copy, or for one that the run did not use that of its prompt set."""
    place = str((folder / PROMPTS).resolve())
    if (folder / PROMPTS).is_dir() and name in available_splits(place):
        return load_split(place, name)
    return load_split(prompt_set, name)
