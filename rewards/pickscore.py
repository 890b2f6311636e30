"""PickScore: a CLIP ViT-H/14 fine-tuned on the choices of Pick-a-Pic's users."""

from __future__ import annotations

from typing import Any

import torch

from flowbench.reward import register_reward
from flowbench.scoring.checkpoints import Weights, load_pretrained
from flowbench.scoring.networks import NetworkReward, is_longer
from flowbench.scoring.preprocess import Preprocessing, crop_shortest_side_floor, normalize

HUB = "yuvalkirstain/PickScore_v1"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@register_reward(
    "pickscore",
    source="2305.01569; github.com/yuvalkirstain/PickScore",
    licence="MIT",
    range=(-100.0, 100.0),
    differentiable=True,
)
class PickScore(NetworkReward):
    """CLIP ViT-H/14 fine-tuned on users' choices: exp(logit_scale) times the cosine of image and prompt.

    model: hub id or folder of a transformers CLIPModel; tokenizer: hub id or folder of its tokenizer, by default the
    model's own folder if that has one, else the one that the authors use.
    """

    half_tolerance = 0.2  # of a cosine times 100

    def __init__(self, model: str = HUB, tokenizer: str | None = None) -> None:
        self.model_name, self.tokenizer_name = model, tokenizer or (TOKENIZER if model == HUB else model)

    def load(self, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.model = load_pretrained("pickscore", CLIPModel, self.model_name).to(device)
        self.tokenizer = load_pretrained("pickscore", AutoTokenizer, self.tokenizer_name)
        self.device = device
        self.preprocess = Preprocessing(self.model.config.vision_config.image_size, crop_shortest_side_floor)
        self._text: dict[str, torch.Tensor] = {}

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        x = normalize(self.preprocess(images.to(self.device))).to(self.model.visual_projection.weight.dtype)
        image = self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output).float()
        cosine = (torch.nn.functional.normalize(image, dim=1) * self._encode_text(prompts)).sum(1)
        return self.model.logit_scale.exp() * cosine

    def cuts(self, prompt: str) -> bool:
        length = self.model.config.text_config.max_position_embeddings
        return is_longer(prompt, length, lambda text: len(self.tokenizer(text).input_ids))

    def networks(self) -> tuple[torch.nn.Module, ...]:
        return (self.model,)

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self.device = device
        self._text = {prompt: embedding.to(device) for prompt, embedding in self._text.items()}

    def _half(self) -> None:
        scale = self.model.logit_scale.data  # its exponential would lose three digits
        self.model.half()
        self.model.logit_scale.data = scale
        self._text = {}

    def weights(self) -> tuple[Weights, ...]:
        own = (Weights(self.model_name, (name,)) for name in ("model.safetensors", "config.json"))
        return *own, Weights(self.tokenizer_name, ("tokenizer.json",))

    def provenance(self) -> dict[str, Any]:
        return {"model": self.model_name, **self.identity()}

    @torch.no_grad()
    def _encode_text(self, prompts: tuple[str, ...]) -> torch.Tensor:
        # One at a time, so that nothing depends on which prompts share a batch.
        length = self.model.config.text_config.max_position_embeddings
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._text:
                tokens = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt")
                pooled = self.model.text_model(**tokens.to(self.device)).pooler_output
                self._text[prompt] = torch.nn.functional.normalize(self.model.text_projection(pooled).float(), dim=1)[0]
        return torch.stack([self._text[p] for p in prompts])
