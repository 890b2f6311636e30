"""A reward that is on the device only while it scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from flowbench.models.memory import release_memory
from flowbench.reward import Reward

if TYPE_CHECKING:
    from flowbench.scoring.checkpoints import Weights

CPU = torch.device("cpu")


def movable(reward: Reward) -> bool:
    """Whether a reward says how its weights are moved."""
    return type(reward).to is not Reward.to


class Visitor(Reward):
    """A reward that comes to the device for its first score and leaves it in `rest`.

    make: the reward, loaded on a device. It is made at once, on the CPU, so that whatever is wrong with it is known
    early. While it rests its weights are in the host's memory, or nowhere after `leave` and for a reward that cannot be
    moved; it is then made again. What identifies it is known all the time.
    """

    def __init__(self, make: Callable[[torch.device], Reward], device: torch.device) -> None:
        self.make, self.device = make, device
        self.reward: Reward | None = make(CPU)
        self.info, self.kind = self.reward.info, type(self.reward)
        self._provenance, self._weights = self.reward.provenance(), self.reward.weights()
        self._there = False

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """As the reward itself, which comes to the device if it is not there."""
        if not self._there:
            self.reward = self._arrived()
            self._there = True
        assert self.reward is not None
        return self.reward.score(images, prompts)

    def _arrived(self) -> Reward:
        if self.reward is not None and not movable(self.reward):
            self.leave()
        if self.reward is None:
            made = self.make(CPU) if self.kind.to is not Reward.to else self.make(self.device)
        else:
            made = self.reward
        made.to(self.device)
        return made

    def rest(self) -> None:
        """Leave the device."""
        if not self._there or self.reward is None:
            return
        if movable(self.reward):
            self.reward.to(CPU)
            self._there = False
            release_memory()
        else:
            self.leave()

    def leave(self) -> None:
        """Leave the host's memory too."""
        self.reward, self._there = None, False
        release_memory()

    def provenance(self) -> dict[str, Any]:
        """The reward's own."""
        return self._provenance

    def cuts(self, prompt: str) -> bool:
        """As the reward itself; not known while it is nowhere."""
        return self.reward is not None and self.reward.cuts(prompt)

    def weights(self) -> tuple[Weights, ...]:
        """The reward's own."""
        return self._weights
