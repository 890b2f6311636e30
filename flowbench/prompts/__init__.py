"""Prompts: strings that carry what their files say of them, sets of them, and the readers of their files.

Built-in sets have a folder each, with a file per split under version control.
"""

from flowbench.prompts.prompt import Prompt, as_prompt
from flowbench.prompts.readers import read_prompts
from flowbench.prompts.sets import (
    FOLDER,
    PromptSplit,
    available_splits,
    choose_prompts,
    load_split,
    locate,
    present_splits,
    prompt_sets,
    save_split,
    splits,
    spread,
    whole_file,
)

__all__ = [
    "FOLDER",
    "Prompt",
    "PromptSplit",
    "as_prompt",
    "available_splits",
    "choose_prompts",
    "load_split",
    "locate",
    "present_splits",
    "prompt_sets",
    "read_prompts",
    "save_split",
    "splits",
    "spread",
    "whole_file",
]
