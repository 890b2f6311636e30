"""LAION's aesthetic predictor: a small head on CLIP's image embedding, trained on people's ratings."""

from __future__ import annotations

from typing import Any

import torch

from flowbench.reward import register_reward
from flowbench.scoring.checkpoints import Weights, find_file, read_tensors
from flowbench.scoring.networks import NetworkReward
from flowbench.scoring.preprocess import Preprocessing, crop_shortest_side
from flowbench.scoring.towers.openclip import clip_weights, load_towers

REPOSITORY = "christophschuhmann/improved-aesthetic-predictor"  # on GitHub
HEAD = "sac+logos+ava1-l14-linearMSE"  # of that repository, with .pth


@register_reward(
    "aesthetic",
    source="github.com/christophschuhmann/improved-aesthetic-predictor",
    licence="Apache-2.0 (head); MIT (CLIP)",
    range=(float("-inf"), float("inf")),
    differentiable=True,
    reads_prompt=False,
)
class Aesthetic(NetworkReward):
    """Predicted rating of an image, about 1 to 10: LAION's head on the embedding of CLIP ViT-L/14; ignores the prompt.

    model, pretrained: the CLIP model, as for the reward `clip`; head: the converted head, or a folder (which may lie
    below FLOWBENCH_WEIGHTS) that contains it. The MLP ("layers.0.weight", ...) and the older linear head ("weight",
    "bias") both fit.
    """

    half_tolerance = 0.02

    def __init__(self, model: str = "ViT-L-14", pretrained: str | None = "openai", head: str = REPOSITORY) -> None:
        self.model_name, self.pretrained, self.head_name = model, pretrained, head

    def load(self, device: torch.device) -> None:
        from flowbench.scoring.towers.heads import load_head

        path = find_file("aesthetic", self.head_name, f"{HEAD}.safetensors", f"{HEAD}.pth", f"github.com/{REPOSITORY}")
        tensors = read_tensors("aesthetic", path)
        self.towers = load_towers("aesthetic", self.model_name, self.pretrained, device)
        self.head = load_head("aesthetic", path, tensors, self.towers.model.visual.output_dim).to(device)
        self.preprocess = Preprocessing(self.towers.size[0], crop_shortest_side)

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        x = self.preprocess(images.to(self.towers.device))
        return self.head(self.towers.embed_images(x))

    def networks(self) -> tuple[torch.nn.Module, ...]:
        return self.towers.model.visual, self.head

    def to(self, device: torch.device) -> None:
        self.towers.to(device)
        self.head.to(device)

    def _half(self) -> None:
        self.towers.halve()  # not the head, whose few layers amplify what is lost

    def weights(self) -> tuple[Weights, ...]:
        head = Weights(self.head_name, (f"{HEAD}.safetensors",), f"{HEAD}.pth", f"github.com/{REPOSITORY}")
        return clip_weights(self.model_name, self.pretrained), head

    def provenance(self) -> dict[str, Any]:
        return {
            "model": self.model_name,
            "pretrained": self.pretrained,
            "head": self.head_name,
            **self.identity(),
        }
