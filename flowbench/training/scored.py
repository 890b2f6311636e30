"""The second half of a rollout: latents are decoded, and the images scored, as far as there are latents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from flowbench.models.memory import Portion
from flowbench.models.policy import Policy
from flowbench.reward import Reward, checked_score
from flowbench.stored import Shelf
from flowbench.training.budget import Budget


class ScoredImages:
    """The images of n latents, and their raw scores by each part of a reward; made from the first latent to the last.

    prompts: of the n images; decoding, scoring: how many are worked on at a time. `given_up` ends the work after the
    portion that is at work; another thread may set it.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        prompts: tuple[str, ...],
        decoding: Portion,
        scoring: Portion,
        budget: Budget,
    ) -> None:
        self.policy, self.reward, self.prompts, self.budget = policy, reward, prompts, budget
        self.decoding, self.scoring = decoding, scoring
        self.done, self.given_up = 0, False
        self._images = Shelf(len(prompts), policy.device)
        self._scores: dict[str, list[torch.Tensor]] = {name: [] for name in reward.parts()}

    @property
    def images(self) -> torch.Tensor:
        """The images (n, 3, H, W) in [0, 1], as a `Shelf` keeps them."""
        return self._images.whole()

    @property
    def scores(self) -> dict[str, torch.Tensor]:
        """The raw scores (n,) by each part of the reward."""
        return {name: torch.cat(parts) for name, parts in self._scores.items()}

    @torch.no_grad()  # of the thread that calls
    def proceed(self, x0: torch.Tensor, ready: int, alone: Callable[[], bool] | None = None) -> None:
        """Decode and score up to row `ready` of the latents x0 (n, C, h, w), whose later rows are not read.

        alone: as in `Portion.map`. The seconds are those of the thread that calls. Raises RunError for a score that is
        not finite, and whatever a reward raises.
        """
        start, device = self.done, self.policy.device
        with self.budget.timed("decode", device):
            for images in self.decoding.map(lambda rows: self.policy.decode(x0[rows]), ready, start=start, alone=alone):
                self._images.add(images)
                if self.given_up:
                    return
        with self.budget.timed("reward", device):
            for name, part in self.reward.parts().items():
                work = partial(_score, part, self.images, self.prompts)
                for scores in self.scoring.map(work, ready, start=start, alone=alone):
                    self._scores[name].append(scores)
                    if self.given_up:
                        return
        self.done = ready


def _score(reward: Reward, images: torch.Tensor, prompts: tuple[str, ...], rows: slice) -> torch.Tensor:
    return checked_score(reward, images[rows], prompts[rows])
