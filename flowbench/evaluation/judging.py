"""Judges: what scores images, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from flowbench.errors import RunError
from flowbench.models.memory import Portion
from flowbench.prompts import Prompt
from flowbench.reward import Reward, checked_score
from flowbench.scoring.visitor import Visitor
from flowbench.testbeds.shapes.truth import truth

Progress = Callable[[int], None]  # images done


@dataclass(frozen=True)
class Judges:
    """What scores the images: reward models by name, and whether the testbed's oracle may be asked.

    held_out: names of those that the run does not train on. On a GPU each is there only while it scores.
    """

    rewards: dict[str, Reward]
    oracle: bool
    held_out: tuple[str, ...] = ()

    def dismiss(self) -> None:
        """Free the memory of those that were here only to score; they come again when they are asked."""
        for reward in self.rewards.values():
            if isinstance(reward, Visitor):
                reward.leave()


@dataclass(frozen=True)
class Lot:
    """Images of one size, given by their place, on any device (B, 3, H, W) in [0, 1], and their prompts."""

    images: Callable[[slice], torch.Tensor]
    prompts: tuple[Prompt, ...]


@torch.no_grad()
def score_images(
    judges: Judges,
    lots: Sequence[Lot],
    device: torch.device,
    portion: Portion,
    progress: Progress = lambda images: None,
) -> dict[str, torch.Tensor]:
    """Scores by metric, on the host, of all images in turn; each judge sees all of them before the next one comes.

    progress is told of each image once per judge. Raises RunError, naming the judge, for a bad score, and for images
    or prompts that the oracle cannot read.
    """
    scores: dict[str, torch.Tensor] = {}
    for name, reward in judges.rewards.items():
        try:
            scores |= _judged(partial(_named_score, name, reward), lots, device, portion, progress)
        finally:
            reward.rest()
    if judges.oracle:
        try:
            scores |= _judged(truth, lots, device, portion, progress)
        except RunError as error:
            raise RunError(f"{error}; name other judges with evaluation.judges") from error
    return scores


def _named_score(
    name: str, reward: Reward, images: torch.Tensor, prompts: tuple[Prompt, ...]
) -> dict[str, torch.Tensor]:
    return {name: checked_score(reward, images, prompts)}


def _judged(
    judge: Callable[[torch.Tensor, tuple[Prompt, ...]], dict[str, torch.Tensor]],
    lots: Sequence[Lot],
    device: torch.device,
    portion: Portion,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """What one judge says of all images, by metric."""
    parts: dict[str, list[torch.Tensor]] = {}

    def score(lot: Lot, rows: slice) -> dict[str, torch.Tensor]:
        return judge(lot.images(rows).to(device), lot.prompts[rows])

    for lot in lots:
        for found in portion.map(partial(score, lot), len(lot.prompts)):
            for name, values in found.items():
                parts.setdefault(name, []).append(values.float().cpu())
            progress(len(next(iter(found.values()))))
    return {name: torch.cat(values) for name, values in parts.items()}
