"""The contract of a reward model, and the guards around every score."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from flowbench.errors import RunError
from flowbench.hooks import defined_at, hook, kind_of
from flowbench.prompts import as_prompt
from flowbench.registry import RewardInfo, register_reward

if TYPE_CHECKING:
    from flowbench.scoring.checkpoints import Weights

logger = logging.getLogger("flowbench")


class Reward:
    """Base class. Subclasses implement `load` and `score`; the model's preset gives the arguments of __init__.

    The methods below `weights` concern sums of rewards; see flowbench/scoring/combination.py.
    """

    info: RewardInfo
    pure: ClassVar[bool] = False  # whether its scores depend on its code alone
    half_tolerance: ClassVar[float | None] = None  # most that scores change if `halve` is called; None is: it may not

    def load(self, device: torch.device) -> None:
        """Load weights onto the device.

        Raises RunError, with the remedy, when they are missing.
        """

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1]; with gradients to the images if declared differentiable.

        prompts: B strings, in a run each a `flowbench.prompts.Prompt`, which also has `category`, `metadata` and
        `reference`.
        """
        raise NotImplementedError

    def to(self, device: torch.device) -> None:
        """Move the loaded weights to another device; by default they stay where `load` has put them."""

    def halve(self) -> None:
        """Compute in float16 from here on; called after `load`, on the CPU, if `half_tolerance` is a number."""

    def rest(self) -> None:
        """Leave the device until the next score, if this reward is only there while it scores; most stay."""

    def provenance(self) -> dict[str, Any]:
        """What identifies the scorer in a record, such as weights' names and hashes.

        "sha256" is the hash of the weights (`scoring.checkpoints.fingerprint`); two rewards with the same one are
        the same judge.
        """
        return {}

    def weights(self) -> tuple[Weights, ...]:
        """The files that `load` needs, to tell without loading whether they are on this machine."""
        return ()

    def cuts(self, prompt: str) -> bool:
        """Whether the prompt is longer than what `score` reads of it; called after `load`."""
        return False

    def parts(self) -> dict[str, Reward]:
        """The rewards that are scored one by one, by name."""
        return {self.info.name: self}

    def observe(self, scores: Mapping[str, torch.Tensor]) -> None:
        """Take note of the parts' scores (B,) of all images of an iteration, before they are combined."""

    def combine(self, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Rewards (B,) from the scores (B,) of `parts`."""
        (score,) = scores.values()
        return score

    def state_dict(self) -> dict[str, Any]:
        """What `observe` learned, for a checkpoint: numbers, strings, lists, dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


def checked_score(reward: Reward, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
    """`reward.score` with its arguments and its result checked; float32 on the images' device.

    Raises RunError, naming the reward, for images of a wrong shape, another number of prompts, a result of a wrong
    shape, or a value that is not finite.
    """
    name = reward.info.name
    if images.shape[1:2] != (3,) and reward.info.domain == "images":
        raise RunError(f"reward '{name}' was given images of shape {tuple(images.shape)}; expected (B, 3, H, W)")
    if len(images) != len(prompts):
        raise RunError(f"reward '{name}' was given {len(images)} images for {len(prompts)} prompts")
    if not images.isfinite().all():
        raise RunError(
            f"reward '{name}' was given an image with NaN; lower training.learning_rate or use more precision"
        )
    prompts = tuple(map(as_prompt, prompts))  # so that a reward may ask any of them for its metadata
    scores, place = _asked(reward, images, prompts), defined_at(_class_of(reward), "score")
    if scores.shape != (len(images),):
        raise RunError(
            f"reward '{name}' returned shape {tuple(scores.shape)} for {len(images)} images; expected ({len(images)},)"
            + place
        )
    bad = ~scores.isfinite()
    if bad.any():
        i = int(bad.nonzero()[0])
        raise RunError(
            f"reward '{name}' is {scores[i].item()} for the prompt {prompts[i]!r}; "
            f"check the reward model's weights and precision{place}"
        )
    return scores


def _asked(reward: Reward, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
    """The reward's answer as float32 on the images' device; what it does to the images reaches nobody else.

    On a CPU, where NumPy may write to them unseen, it is given a copy. Elsewhere a copy would cost the device's memory,
    and torch counts what is written. Raises RunError as `hook` does, for what is no tensor of numbers, and for images
    that it has changed.
    """
    owner, cls = f"reward '{reward.info.name}'", _class_of(reward)
    given = images.clone() if images.device.type == "cpu" and not images.requires_grad else images
    written = _writes(given)
    with hook(owner, "score", cls):
        answer = reward.score(given, prompts)
    if given is images and _writes(images) != written:
        raise RunError(
            f"{owner} changes its images in place in score{defined_at(cls, 'score')}; write images = images - 0.5 and "
            "not images.sub_(0.5)"
        )
    try:
        return torch.as_tensor(answer).float().to(images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(answer, torch.Tensor):
            raise
        raise RunError(
            f"{owner} returns {kind_of(answer)} from score{defined_at(cls, 'score')}; expected a tensor of "
            f"{len(images)} numbers"
        ) from error


def _class_of(reward: Reward) -> type[Reward]:
    """The plug-in's own class, also of one that only visits the device."""
    kind: type[Reward] = getattr(reward, "kind", type(reward))
    return kind


def _writes(images: torch.Tensor) -> int:
    """How often a tensor was written to, as far as torch counts that."""
    return 0 if images.is_inference() else images._version


def check_signal(info: RewardInfo, scores: torch.Tensor, iteration: int) -> None:
    """Whether an iteration's scores (B,) say anything at all.

    A continuous reward that is equal for all images is broken (all zeros, weights that ignore the pixels), or the model
    has collapsed to a single image. A discrete one, such as right or wrong, may rightly be equal for all images of a
    hard prompt, so that is said and the run goes on.
    Raises RunError, naming the reward, in the first case.
    """
    if len(scores) < 2 or not torch.equal(scores, scores[:1].expand_as(scores)):
        return
    what = f"reward '{info.name}' is {scores[0].item():g} for all {len(scores)} images of iteration {iteration}"
    if not info.discrete:
        raise RunError(f"{what}, so nothing can be learnt from it; check its weights and its input")
    logger.warning("%s; nothing is learnt from them", what)


__all__ = ["Reward", "check_signal", "checked_score", "register_reward"]
