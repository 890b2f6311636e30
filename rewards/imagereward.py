"""ImageReward: BLIP with a head, trained on experts' rankings of images of one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flowbench.errors import RunError
from flowbench.models.presets import resolve_weights
from flowbench.reward import register_reward
from flowbench.scoring.checkpoints import (
    Weights,
    brief,
    find_file,
    load_pretrained,
    read_json,
    read_tensors,
)
from flowbench.scoring.networks import NetworkReward, is_longer
from flowbench.scoring.preprocess import Preprocessing, crop_shortest_side, normalize

HUB = "THUDM/ImageReward"
TOKENIZER = "google-bert/bert-base-uncased"
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw values on the authors' data
CONFIG = "imagereward_config.json"  # of a network of another size; the official one has none


@register_reward(
    "imagereward",
    source="2304.05977; github.com/THUDM/ImageReward",
    licence="Apache-2.0",
    range=(float("-inf"), float("inf")),
    differentiable=True,
)
class ImageReward(NetworkReward):
    """BLIP's image-grounded text encoder with a head, trained on human rankings; about normal with deviation 1.

    model: hub id or folder of the converted checkpoint; tokenizer: hub id or folder of BERT's uncased tokenizer, by
    default the model's own folder if it is a network of another size.
    """

    half_tolerance = 0.02

    def __init__(self, model: str = HUB, tokenizer: str | None = None) -> None:
        self.model_name, self.tokenizer_name = model, tokenizer

    def load(self, device: torch.device) -> None:
        from transformers import AutoTokenizer

        from flowbench.scoring.towers.blip import BlipReward, load_blip_reward

        path = find_file("imagereward", self.model_name, "ImageReward.safetensors", pickle="ImageReward.pt")
        config = Path(resolve_weights(self.model_name)) / CONFIG
        settings = read_json("imagereward", config) if config.is_file() else {}
        self.mean, self.std = settings.pop("mean", MEAN), settings.pop("std", STD)
        self.max_tokens = settings.pop("max_tokens", MAX_TOKENS)
        own = self.model_name if config.is_file() else TOKENIZER
        self.tokenizer = load_pretrained("imagereward", AutoTokenizer, self.tokenizer_name or own)
        if own == TOKENIZER:  # BLIP's two special tokens, which a prompt might contain
            self.tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        try:
            with torch.device(device):
                self.model = BlipReward(**settings)
        except (TypeError, ValueError) as error:
            raise RunError(f"reward 'imagereward': '{config}' describes no network: {brief(error)}") from error
        load_blip_reward("imagereward", path, self.model, read_tensors("imagereward", path))
        self.model.eval().requires_grad_(False)
        self.device, self.dtype = device, torch.float32
        self.preprocess = Preprocessing(self.model.vision.config.image_size, crop_shortest_side)

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        pixels = normalize(self.preprocess(images.to(self.device))).to(self.dtype)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        return (self.model(pixels, tokens.input_ids, tokens.attention_mask) - self.mean) / self.std

    def cuts(self, prompt: str) -> bool:
        return is_longer(prompt, self.max_tokens, lambda text: len(self.tokenizer(text).input_ids))

    def networks(self) -> tuple[torch.nn.Module, ...]:
        return (self.model,)

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self.device = device

    def _half(self) -> None:
        self.model.half()
        self.model.head.float()
        self.dtype = torch.float16

    def weights(self) -> tuple[Weights, ...]:
        checkpoint = Weights(self.model_name, ("ImageReward.safetensors",), "ImageReward.pt")
        tokenizer = self.tokenizer_name or (TOKENIZER if self.model_name == HUB else self.model_name)
        sizes = Path(resolve_weights(self.model_name)) / CONFIG
        own = (Weights(self.model_name, (CONFIG,)),) if sizes.is_file() else ()
        return checkpoint, Weights(tokenizer, ("tokenizer.json", "vocab.txt")), *own

    def provenance(self) -> dict[str, Any]:
        return {"model": self.model_name, **self.identity()}
