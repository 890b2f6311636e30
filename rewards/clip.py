"""CLIP similarity of image and prompt, by any open_clip model."""

from __future__ import annotations

from typing import Any

import torch

from flowbench.reward import register_reward
from flowbench.scoring.checkpoints import Weights
from flowbench.scoring.preprocess import Preprocessing, crop_shortest_side
from flowbench.scoring.towers.openclip import TowersReward, clip_weights, load_towers


@register_reward(
    "clip",
    source="2103.00020; open_clip",
    licence="MIT (open_clip); the weights' own licence applies",
    range=(-1.0, 1.0),
    differentiable=True,
)
class Clip(TowersReward):
    """Cosine of the CLIP embeddings of image and prompt.

    model: an open_clip name with its `pretrained` tag or weights file, or a folder in open_clip's own format. A tag's
    hub repository is looked for below FLOWBENCH_WEIGHTS first.
    """

    half_tolerance = 2e-3

    def __init__(self, model: str = "ViT-H-14", pretrained: str | None = None) -> None:
        self.model_name, self.pretrained = model, pretrained

    def load(self, device: torch.device) -> None:
        self.towers = load_towers("clip", self.model_name, self.pretrained, device)
        self.preprocess = Preprocessing(self.towers.size[0], crop_shortest_side)

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        x = images.to(self.towers.device)
        if tuple(x.shape[-2:]) != self.towers.size:  # images of the right size keep the precision that they have
            x = self.preprocess(x)
        return self.cosine(x, prompts)

    def weights(self) -> tuple[Weights, ...]:
        return (clip_weights(self.model_name, self.pretrained),)

    def provenance(self) -> dict[str, Any]:
        return {"model": self.model_name, "pretrained": self.pretrained, **self.identity()}
