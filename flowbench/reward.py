"""The contract of a reward model, and the guard around every score."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .errors import RunError
from .registry import RewardInfo, register_reward


class Reward:
    """Base class. Subclasses implement `load` and `score`; the model's preset gives the arguments of __init__."""

    info: ClassVar[RewardInfo]

    def load(self, device: torch.device) -> None:
        """Load weights onto the device.

        Raises RunError, with the remedy, when they are missing.
        """

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1]; with gradients to the images if declared differentiable."""
        raise NotImplementedError

    def provenance(self) -> dict[str, Any]:
        """What identifies the scorer in a record, such as weights' names and hashes."""
        return {}


def checked_score(reward: Reward, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
    """`reward.score` with its result checked; float32 on the images' device.

    Raises RunError, naming the reward, for a wrong shape or a value that is not finite.
    """
    name = reward.info.name
    if len(images) != len(prompts):
        raise RunError(f"reward '{name}' was given {len(images)} images for {len(prompts)} prompts")
    if not images.isfinite().all():
        raise RunError(
            f"reward '{name}' was given an image with NaN; lower training.learning_rate or use more precision"
        )
    scores = torch.as_tensor(reward.score(images, prompts)).float().to(images.device)
    if scores.shape != (len(images),):
        raise RunError(
            f"reward '{name}' returned shape {tuple(scores.shape)} for {len(images)} images; expected ({len(images)},)"
        )
    bad = ~scores.isfinite()
    if bad.any():
        i = int(bad.nonzero()[0])
        raise RunError(
            f"reward '{name}' is {scores[i].item()} for the prompt {prompts[i]!r}; "
            "check the reward model's weights and precision"
        )
    return scores


__all__ = ["Reward", "checked_score", "register_reward"]
