"""The stages of a build by name, apart from their code, so that a misspelt one is answered at once."""

from __future__ import annotations

from collections.abc import Sequence

from flowbench.errors import UsageError, did_you_mean

STAGES = ("vae", "clip", "text", "transformer", "rewards")


def chosen_stages(only: Sequence[str]) -> tuple[str, ...]:
    """The stages to train: those named, else all.

    Raises UsageError for an unknown stage.
    """
    for stage in only:
        if stage not in STAGES:
            raise UsageError(f"unknown stage '{stage}'{did_you_mean(stage, STAGES)}")
    return tuple(only) or STAGES
