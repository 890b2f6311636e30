"""The truth of the world of shapes, as a reward."""

from __future__ import annotations

import torch

from flowbench.reward import Reward, register_reward


@register_reward(
    "oracle",
    source="flowbench testbed (flowbench/testbeds/shapes/oracle.py)",
    licence="Apache-2.0",
    range=(0.0, 1.0),
    differentiable=False,
    truth=True,
    discrete=True,  # 0 for every picture without an object
)
class Oracle(Reward):
    """Mean of the oracle's soft and exact verdicts; only for prompts of the world of shapes."""

    pure = True

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        from flowbench.testbeds.shapes.truth import truth

        verdicts = truth(images.detach(), prompts)
        return (verdicts["oracle_exact"] + verdicts["oracle_soft"]) / 2
