"""How the rewards of an iteration become advantages of policy gradients: by the prompt's group, or by its buffer.

Means and deviations are taken in float64, so that images of equal reward have an advantage of exactly 0. Deviations are
the population's (divided by n), as in the reference implementations.
"""

from __future__ import annotations

import torch

from flowbench.rollout import Rollout, means_within


def group_advantages(rollout: Rollout, global_std: bool, bound: float) -> torch.Tensor:
    """(r - mean of the prompt's images) / (deviation + 1e-4), clipped to +-bound, (B,) in the reward's dtype.

    The deviation is that of all rewards of the iteration with `global_std`, else that of the prompt's images.
    Flow-GRPO's (yifan123/flow_grpo, commit ac4c86e8, flow_grpo/stat_tracking.py).
    """
    r = rollout.reward.double()
    centered = rollout.center(r)
    std = r.std(correction=0) if global_std else means_within(centered.square(), rollout.group).sqrt()
    return (centered / (std + 1e-4)).clamp(-bound, bound).to(rollout.reward.dtype)


class PromptBuffer:
    """The latest rewards of each prompt over a whole run, which its images are judged by.

    DDPO's (kvablack/ddpo-pytorch, commit 1958463f, ddpo_pytorch/stat_tracking.py). rewards: prompt to its last `size`
    rewards, the newest at the end.
    """

    def __init__(self, size: int, min_count: int) -> None:
        self.size, self.min_count = size, min_count
        self.rewards: dict[str, list[float]] = {}

    def advantages(self, rollout: Rollout, bound: float) -> torch.Tensor:
        """(r - mean) / (deviation + 1e-6), clipped to +-bound, (B,) in the reward's dtype; takes the rewards in first.

        Mean and deviation are those of the prompt's buffer, or of the whole iteration while the buffer holds fewer than
        `min_count`.
        """
        r = rollout.reward.double()
        for prompt, reward in zip(rollout.prompts, r.tolist(), strict=True):
            kept = self.rewards.setdefault(prompt, [])
            kept.append(reward)
            del kept[: -self.size]
        everyone = r.mean().item(), r.std(correction=0).item()
        stats = {prompt: self._own(prompt) or everyone for prompt in set(rollout.prompts)}
        mean, std = r.new_tensor([stats[prompt] for prompt in rollout.prompts]).unbind(1)
        return ((r - mean) / (std + 1e-6)).clamp(-bound, bound).to(rollout.reward.dtype)

    def _own(self, prompt: str) -> tuple[float, float] | None:
        """Mean and deviation of a prompt's buffer, or None while it holds too few."""
        kept = torch.tensor(self.rewards[prompt], dtype=torch.float64)
        return None if len(kept) < self.min_count else (kept.mean().item(), kept.std(correction=0).item())
