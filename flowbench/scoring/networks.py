"""What rewards that are made of networks share: they can be moved, and where it is stated halved, once loaded."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flowbench.reward import Reward
from flowbench.scoring.checkpoints import fingerprint


def is_longer(prompt: str, limit: int, tokens: Callable[[str], int]) -> bool:
    """Whether a prompt has more than `limit` tokens. tokens: counts them, the two special ones included.

    A token is a byte or more, so that those of short prompts need not be counted.
    """
    return len(prompt.encode()) + 2 > limit and tokens(prompt) > limit


class NetworkReward(Reward):
    """A reward whose weights lie in networks.

    A subclass names the networks that identify it, and says in `to` and `_half` what else is moved and halved.
    """

    halved = False
    _sha256: str | None = None

    @abstractmethod
    def networks(self) -> tuple[nn.Module, ...]:
        """Those whose weights identify the reward, after `load`."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """As in the base class."""

    def halve(self) -> None:
        """As in the base class; the reward keeps the hash of its weights as they were loaded."""
        self._sha256 = self.identity()["sha256"]
        self._half()
        self.halved = True

    def _half(self) -> None:
        for network in self.networks():
            network.half()

    def identity(self) -> dict[str, Any]:
        """The weights' hash, and the precision where it is not float32; for `provenance`."""
        sha256 = self._sha256 or fingerprint(*self.networks())
        return {"sha256": sha256, **({"precision": "float16"} if self.halved else {})}
