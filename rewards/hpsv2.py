"""Human Preference Score v2: a CLIP ViT-H/14 fine-tuned on human choices between images of one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flowbench.errors import UsageError
from flowbench.models.presets import resolve_weights
from flowbench.reward import register_reward
from flowbench.scoring.checkpoints import Weights, find_file
from flowbench.scoring.preprocess import TensorPreprocessing, pad_longest_side
from flowbench.scoring.towers.openclip import TowersReward, load_checkpoint, load_towers

HUB = "xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed", "v2.1": "HPS_v2.1_compressed"}  # of the hub repository, with .pt
ARCHITECTURE = "ViT-H-14"


@register_reward(
    "hpsv2",
    source="2306.09341; github.com/tgxs002/HPSv2",
    licence="Apache-2.0",
    range=(-1.0, 1.0),
    differentiable=True,
)
class HpsV2(TowersReward):
    """Cosine of image and prompt under CLIP ViT-H/14 fine-tuned on human preferences (HPS v2.0 or v2.1).

    model: the hub id, a folder with the converted checkpoint, the checkpoint itself, or a folder in open_clip's own
    format. version: "v2.0" or "v2.1"; their scores are not comparable, and the package's default is v2.0.
    """

    half_tolerance = 2e-3

    def __init__(self, version: str = "v2.1", model: str = HUB) -> None:
        if version not in FILES:
            raise UsageError(f"reward 'hpsv2' has no version '{version}'; there are: {', '.join(FILES)}")
        other = next(v for v in FILES if v != version)
        if Path(model).stem == FILES[other]:
            raise UsageError(f"reward 'hpsv2': '{model}' is version {other}; set version to {other}")
        self.version, self.model_name = version, model

    def load(self, device: torch.device) -> None:
        folder = Path(resolve_weights(self.model_name))
        if self.model_name.startswith("embedded:") or (folder / "open_clip_config.json").is_file():
            self.towers = load_towers("hpsv2", self.model_name, None, device)
        else:
            name = FILES[self.version]
            path = find_file("hpsv2", self.model_name, f"{name}.safetensors", pickle=f"{name}.pt")
            self.towers = load_checkpoint("hpsv2", ARCHITECTURE, path, device)
        # Not open_clip's own, which would crop and resize by PIL: the package pads and resizes tensors.
        self.preprocess = TensorPreprocessing(self.towers.size[0], pad_longest_side)

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        x = self.preprocess(images.to(self.towers.device))
        return self.cosine(x, prompts)

    def weights(self) -> tuple[Weights, ...]:
        name = FILES[self.version]
        return (Weights(self.model_name, (f"{name}.safetensors", "open_clip_model.safetensors"), f"{name}.pt"),)

    def provenance(self) -> dict[str, Any]:
        return {"version": self.version, "model": self.model_name, **self.identity()}
