"""ImageReward by the package image-reward itself, in a worker: the reference for the reward `imagereward`."""

from __future__ import annotations

import importlib
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from flowbench.errors import RunError
from flowbench.models.presets import resolve_weights
from flowbench.reward import Reward, register_reward
from flowbench.rewards.imagereward import CONFIG, HUB, TOKENIZER, ImageReward
from flowbench.scoring.checkpoints import find_file, fingerprint, load_strictly, read_json, read_tensors
from flowbench.scoring.preprocess import Preprocessing, crop_shortest_side, normalize, to_pil
from flowbench.scoring.workers.packages import REQUIREMENTS

if TYPE_CHECKING:
    from flowbench.scoring.checkpoints import Weights

NAME = "imagereward-package"
MAX_TOKENS = 35


@register_reward(
    NAME,
    source="2304.05977; image-reward 1.5",
    licence="Apache-2.0",
    range=(float("-inf"), float("inf")),
    differentiable=True,
    requirements=REQUIREMENTS,
)
class ImageRewardPackage(Reward):
    """ImageReward by its own package; arguments as for `imagereward`.

    Reported scores are those of the package's `score`, one image at a time; with gradients its `score_gard` is called.
    """

    def __init__(self, model: str = HUB, tokenizer: str | None = None) -> None:
        self.model_name, self.tokenizer_name = model, tokenizer

    def load(self, device: torch.device) -> None:
        from flowbench.scoring.towers.blip import TEXT, VISION

        path = find_file(NAME, self.model_name, "ImageReward.safetensors", pickle="ImageReward.pt")
        config = Path(resolve_weights(self.model_name)) / CONFIG
        settings = read_json(NAME, config) if config.is_file() else {}
        folder = resolve_weights(self.tokenizer_name or (self.model_name if config.is_file() else TOKENIZER))
        self.vision, self.text = settings.get("vision", VISION), settings.get("text", TEXT)
        self.model = _build(self.vision, self.text, folder, device)
        _fill(self.model, path, read_tensors(NAME, path))
        self.model.to(device).eval().requires_grad_(False)
        self.device = device
        self.preprocess = Preprocessing(224, crop_shortest_side)

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        if not (images.requires_grad and torch.is_grad_enabled()):
            pairs = zip(prompts, to_pil(images), strict=True)
            return torch.tensor([self.model.score(prompt, picture) for prompt, picture in pairs])
        x = normalize(self.preprocess.differentiable(images.to(self.device)))
        tokens = self.model.blip.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        return self.model.score_gard(tokens.input_ids, tokens.attention_mask, x)[:, 0]

    def weights(self) -> tuple[Weights, ...]:
        return ImageReward(self.model_name, self.tokenizer_name).weights()

    def provenance(self) -> dict[str, Any]:
        return {"model": self.model_name, "sha256": fingerprint(self._renamed())}

    def _renamed(self) -> torch.nn.Module:
        """flowbench's network with the package's weights, so that the same checkpoint has the same hash."""
        from flowbench.scoring.towers.blip import BlipReward, official_tensors

        with torch.device("meta"):
            module = BlipReward(self.vision, self.text)
        names, weights = zip(official_tensors(module), module.state_dict(), strict=True), self.model.state_dict()
        module.load_state_dict({own: weights[official] for official, own in names}, assign=True)
        return module


def _build(vision: dict[str, Any], text: dict[str, Any], tokenizer: str, device: torch.device) -> Any:
    """The package's own network, with a local tokenizer where it would ask the hub for BERT's.

    Sizes other than the official ones are put in where the package writes its own as constants.
    """
    from ImageReward.models.BLIP import blip, blip_pretrain, vit
    from transformers import BertTokenizer

    from flowbench.scoring.towers.blip import VISION

    package: Any = importlib.import_module("ImageReward.ImageReward")  # as an attribute it is hidden by the class
    original = blip.BertTokenizer, blip_pretrain.create_vit, package.MLP
    local = SimpleNamespace(from_pretrained=lambda _: BertTokenizer.from_pretrained(tokenizer))
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as med:
        json.dump({"model_type": "bert", "hidden_act": "gelu", "add_cross_attention": True, **text}, med)
        med.flush()
        try:
            blip.BertTokenizer = local
            if vision != VISION:
                tower = vit.VisionTransformer(
                    img_size=vision["image_size"],
                    patch_size=vision["patch_size"],
                    embed_dim=vision["hidden_size"],
                    depth=vision["num_hidden_layers"],
                    num_heads=vision["num_attention_heads"],
                    mlp_ratio=vision["intermediate_size"] / vision["hidden_size"],
                )
                blip_pretrain.create_vit = lambda *_: (tower, vision["hidden_size"])
                package.MLP = lambda _: original[2](text["hidden_size"])
            return package.ImageReward(med.name, device)
        except (OSError, ValueError, TypeError) as error:
            raise RunError(
                f"reward '{NAME}' cannot load BERT's tokenizer from '{tokenizer}'; give a folder with its vocab.txt "
                "as `tokenizer`"
            ) from error
        finally:
            blip.BertTokenizer, blip_pretrain.create_vit, package.MLP = original


def _fill(model: Any, path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Load the weights; only those that no score depends on may be missing."""
    beginnings = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
    unused = [name for name in model.state_dict() if name.startswith(beginnings)]
    load_strictly(NAME, path, model, tensors, unused)
