"""HPSv2 by the package hpsv2 itself, in a worker: the reference that the reward `hpsv2` is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowbench.models.presets import resolve_weights
from flowbench.reward import Reward, register_reward
from flowbench.rewards.hpsv2 import ARCHITECTURE, FILES, HUB, HpsV2
from flowbench.scoring.checkpoints import find_file, fingerprint, load_strictly, read_json, read_tensors
from flowbench.scoring.preprocess import to_pil
from flowbench.scoring.workers.packages import REQUIREMENTS, clip_vocabulary

if TYPE_CHECKING:
    from flowbench.scoring.checkpoints import Weights

NAME = "hpsv2-package"


@register_reward(
    NAME,
    source="2306.09341; hpsv2 1.2.0",
    licence="Apache-2.0",
    range=(-1.0, 1.0),
    differentiable=True,
    requirements=REQUIREMENTS,
)
class HpsV2Package(Reward):
    """HPSv2 by its own package; arguments as for `hpsv2`.

    The package's `score` loads the checkpoint anew at every call and has no gradient, so its model, tokenizer and
    preprocessing are called directly. They run in float32.
    """

    def __init__(self, version: str = "v2.1", model: str = HUB) -> None:
        HpsV2(version, model)  # refuses what it does not know
        self.version, self.model_name = version, model

    def load(self, device: torch.device) -> None:
        from torchvision.transforms import Compose

        with clip_vocabulary():
            from hpsv2.src import open_clip

        folder = Path(resolve_weights(self.model_name))
        if (folder / "open_clip_config.json").is_file():  # a network of another size
            architecture, path = f"{folder.name}-of-flowbench", folder / "open_clip_model.safetensors"
            config = read_json(NAME, folder / "open_clip_config.json")["model_cfg"]
            open_clip.factory._MODEL_CONFIGS[architecture] = config
        else:
            name = FILES[self.version]
            architecture = ARCHITECTURE
            path = find_file(NAME, self.model_name, f"{name}.safetensors", pickle=f"{name}.pt")
        tensors = read_tensors(NAME, path)
        # As the package's own `initialize_model` does, but without the weights of LAION's CLIP.
        self.model, _, self.transform = open_clip.create_model_and_transforms(
            architecture, precision="fp32", device=device, light_augmentation=True, output_dict=True
        )
        load_strictly(NAME, path, self.model, tensors)
        self.model.eval().requires_grad_(False)
        self.tokenizer, self.device = open_clip.tokenize, device
        # After the conversion to a tensor: resizing, padding and normalisation, which have gradients.
        self.from_tensor = Compose(self.transform.transforms[2:])

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        if images.requires_grad and torch.is_grad_enabled():
            x = [self.from_tensor(image) for image in images]
        else:
            x = [self.transform(picture) for picture in to_pil(images)]
        outputs = self.model(torch.stack(x).to(self.device), self.tokenizer(list(prompts)).to(self.device))
        return torch.diagonal(outputs["image_features"] @ outputs["text_features"].T)

    def weights(self) -> tuple[Weights, ...]:
        return HpsV2(self.version, self.model_name).weights()

    def provenance(self) -> dict[str, Any]:
        return {"version": self.version, "model": self.model_name, "sha256": fingerprint(self.model)}
