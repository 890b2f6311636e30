"""mini-clip's weights in transformers' classes, with fewer layers and CLIP's official normalisation of pixels."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from torch import nn
from transformers import BlipTextModel, BlipVisionModel, CLIPConfig, CLIPModel, CLIPTokenizer

from flowbench.builders.clip import Widths
from flowbench.builders.tokenizer import MAX_TOKENS
from flowbench.scoring.preprocess import CLIP_MEAN, CLIP_STD

WORD_STD = 0.05  # deviation of a BLIP text encoder's word embeddings at the start
VISION_LAYERS, TEXT_LAYERS = (0, 1, 3), (0, 2)  # of mini-clip's; the file is then two thirds of its size


def clip_model(tokenizer: CLIPTokenizer, widths: Widths = Widths()) -> CLIPModel:
    """An untrained CLIPModel of mini-clip's widths."""
    common = {"hidden_act": "gelu", "projection_dim": widths.embed}
    vision = {"hidden_size": widths.vision, "intermediate_size": 4 * widths.vision, "image_size": 32, "patch_size": 4}
    vision |= {"num_hidden_layers": len(VISION_LAYERS), "num_attention_heads": widths.vision // 32}
    text = {"hidden_size": widths.text, "intermediate_size": 4 * widths.text, "vocab_size": len(tokenizer)}
    text |= {"num_hidden_layers": len(TEXT_LAYERS), "num_attention_heads": widths.text // 32}
    text |= {"max_position_embeddings": MAX_TOKENS, "pad_token_id": tokenizer.pad_token_id}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPModel(
        CLIPConfig(text_config={**text, **common}, vision_config={**vision, **common}, projection_dim=widths.embed)
    )


@torch.no_grad()
def copy_clip(source: open_clip.CLIP, target: CLIPModel) -> None:
    """Start `target` from `source`, whose pixels are normalised by mean 0.5 and deviation 0.5."""
    vision, text = target.vision_model, target.text_model
    kernel, offset = _renormalised(source.visual.conv1.weight)
    vision.embeddings.patch_embedding.weight.copy_(kernel)
    vision.embeddings.position_embedding.weight.copy_(source.visual.positional_embedding)
    vision.embeddings.position_embedding.weight[1:] += offset  # CLIP's patches have no bias, but positions do
    vision.embeddings.class_embedding.copy_(source.visual.class_embedding)
    _copy(source.visual.ln_pre, vision.pre_layrnorm)
    _copy(source.visual.ln_post, vision.post_layernorm)
    target.visual_projection.weight.copy_(source.visual.proj.T)
    text.embeddings.token_embedding.weight.copy_(source.token_embedding.weight)
    text.embeddings.position_embedding.weight.copy_(source.positional_embedding)
    _copy(source.ln_final, text.final_layer_norm)
    target.text_projection.weight.copy_(source.text_projection.T)
    target.logit_scale.copy_(source.logit_scale)
    for blocks, layers, kept in (
        (source.visual.transformer.resblocks, vision.encoder.layers, VISION_LAYERS),
        (source.transformer.resblocks, text.encoder.layers, TEXT_LAYERS),
    ):
        for layer, number in zip(layers, kept, strict=True):
            _copy_block(blocks[number], layer)


@torch.no_grad()
def copy_vision(source: open_clip.CLIP, target: BlipVisionModel) -> None:
    """Start a BLIP vision transformer of mini-clip's width from mini-clip's first layers."""
    embeddings, visual = target.embeddings, source.visual
    kernel, offset = _renormalised(visual.conv1.weight)
    embeddings.patch_embedding.weight.copy_(kernel)
    embeddings.patch_embedding.bias.copy_(offset)
    embeddings.position_embedding[0].copy_(visual.positional_embedding)
    embeddings.class_embedding[0, 0].copy_(visual.class_embedding)
    for layer, block in zip(target.encoder.layers, visual.transformer.resblocks, strict=False):
        layer.self_attn.qkv.weight.copy_(block.attn.in_proj_weight)
        layer.self_attn.qkv.bias.copy_(block.attn.in_proj_bias)
        _copy(block.attn.out_proj, layer.self_attn.projection)
        _copy_rest(block, layer)


@torch.no_grad()
def copy_words(source: open_clip.CLIP, target: BlipTextModel) -> None:
    """Start a BLIP text encoder's word embeddings from mini-clip's, at the scale of its own initialisation."""
    words, known = target.embeddings.word_embeddings.weight, source.token_embedding.weight
    words.copy_(known * (WORD_STD / known.std()))


def _renormalised(kernel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel and bias that do with z = (x - mean) / std what `kernel` does with 2 x - 1 = 2 std z + (2 mean - 1)."""
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    return kernel * 2 * std, (kernel * (2 * mean - 1)).sum((1, 2, 3))


def _copy_block(block: Any, layer: Any) -> None:
    attention = layer.self_attn
    weights = block.attn.in_proj_weight.chunk(3)
    biases = block.attn.in_proj_bias.chunk(3)
    for part, weight, bias in zip((attention.q_proj, attention.k_proj, attention.v_proj), weights, biases, strict=True):
        part.weight.copy_(weight)
        part.bias.copy_(bias)
    _copy(block.attn.out_proj, attention.out_proj)
    _copy_rest(block, layer)


def _copy_rest(block: Any, layer: Any) -> None:
    _copy(block.ln_1, layer.layer_norm1)
    _copy(block.ln_2, layer.layer_norm2)
    _copy(block.mlp.c_fc, layer.mlp.fc1)
    _copy(block.mlp.c_proj, layer.mlp.fc2)


def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())
