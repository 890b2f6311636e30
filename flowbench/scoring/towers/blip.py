"""ImageReward's network: BLIP's vision transformer, its text encoder with cross-attention, a head on the first token.

Built of transformers' classes; weights have the names of the official checkpoint on disk and transformers' in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from flowbench.scoring.checkpoints import load_strictly
from flowbench.scoring.towers.heads import Layers

# BLIP ViT-L/16 and BERT base, as ImageReward builds them. Settings that change the reward without an error if they are
# left to transformers' defaults: the layer norms' epsilon and the number of text heads.
VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
}
HEAD = (1024, 128, 64, 16, 1)
HEAD_PLACES = (0, 2, 4, 6, 7)

# Beginnings of the vision transformer's names: the official ones, and transformers'.
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
}
_BLOCK = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    "mlp.": "mlp.",
}
# Of BLIP's pre-training; ImageReward does not use them.
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\..*|blip\.text_encoder\.embeddings\.position_ids")


class BlipReward(nn.Module):
    """Values (B,) of images and tokenised prompts."""

    def __init__(
        self,
        vision: Mapping[str, Any] = VISION,
        text: Mapping[str, Any] = TEXT,
        head: tuple[int, ...] = HEAD,
        head_places: tuple[int, ...] | None = HEAD_PLACES,
    ) -> None:
        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(hidden_act="gelu", **vision))
        cross = BlipTextConfig(hidden_act="gelu", encoder_hidden_size=vision["hidden_size"], is_decoder=True, **text)
        self.text = BlipTextModel(cross, add_pooling_layer=False)
        self.head = Layers((text["hidden_size"], *head), head_places)

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, size, size) normalised; tokens and mask (B, L), mask 0 for padding."""
        return self.rate(self.see(pixels), tokens, mask)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """States (B, patches + 1, D) of the vision transformer."""
        return self.vision(pixel_values=pixels).last_hidden_state

    def rate(self, seen: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Values (B,) of tokenised prompts on images that were seen."""
        states = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        return self.head(states[:, 0].float())


def load_blip_reward(reward: str, path: Path, module: BlipReward, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill the network from tensors with the official names.

    Raises RunError when one is missing, left over, or of another shape.
    """
    names = {official: own for own, official in _official_names(module).items()}
    used = {name: value for name, value in tensors.items() if not _UNUSED.fullmatch(name)}
    load_strictly(reward, path, module, {names.get(name, name): value for name, value in used.items()})


def official_tensors(module: BlipReward) -> dict[str, torch.Tensor]:
    """The network's weights under their official names."""
    names = _official_names(module)
    return {names[own]: value for own, value in module.state_dict().items()}


def _official_names(module: BlipReward) -> dict[str, str]:
    """transformers' names to the official ones."""
    beginnings = {f"vision.{own}": f"blip.visual_encoder.{name}" for name, own in _VISION.items()}
    for n in range(module.vision.config.num_hidden_layers):
        block, layer = f"blip.visual_encoder.blocks.{n}.", f"vision.encoder.layers.{n}."
        beginnings |= {layer + own: block + name for name, own in _BLOCK.items()}
    beginnings |= {"text.": "blip.text_encoder.", "head.": "mlp."}
    names = {}
    for name in module.state_dict():
        own, official = next((o, f) for o, f in beginnings.items() if name.startswith(o))
        names[name] = official + name.removeprefix(own)
    return names
