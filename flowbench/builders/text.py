"""Stage 3: the two frozen contrastive text towers of mini-sd3, the counterpart of SD3's CLIP encoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from flowbench.builders.clip import contrastive_batch, info_nce
from flowbench.builders.fit import FitPlan, Progress, fit
from flowbench.builders.tokenizer import MAX_TOKENS

WIDTH = 96
PLAN = FitPlan("text", steps=700, lr=2e-3, weight_decay=0.05, checkpoint_every=200)
BATCH = 96


def text_config(tokenizer: CLIPTokenizer, activation: str) -> CLIPTextConfig:
    """SD3 feeds the penultimate layer's states and the pooled projection of each tower to the transformer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act=activation,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


class TwoTowers(nn.Module):
    """Both text towers, to be contrasted with a locked image tower (2111.07991)."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.first = CLIPTextModelWithProjection(text_config(tokenizer, "quick_gelu"))
        self.second = CLIPTextModelWithProjection(text_config(tokenizer, "gelu"))
        self.log_temperature = nn.Parameter(torch.tensor(3.0))

    def loss(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """InfoNCE of each tower against normalised image embeddings (B, D); tokens (2 B, L), the second half wrong."""
        texts = (F.normalize(tower(input_ids=tokens).text_embeds.float(), dim=1) for tower in (self.first, self.second))
        first, second = (info_nce(image, text, tokens, self.log_temperature) for text in texts)
        return (first + second) / 2


def train_text_towers(
    tokenizer: CLIPTokenizer,
    locked: open_clip.CLIP,
    work: Path,
    seed: int,
    device: torch.device,
    progress: Progress,
    plan: FitPlan = PLAN,
) -> TwoTowers:
    """Train both towers against the image tower of `locked`, with one hard negative caption per image."""
    torch.manual_seed(seed + 1)
    towers = TwoTowers(tokenizer).to(device)

    def loss(step: int) -> torch.Tensor:
        images, captions, wrong = contrastive_batch(BATCH, np.random.default_rng([seed, 3, step]))
        texts = [c.text for c in captions + wrong]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            image = locked.encode_image(images.to(device) * 2 - 1, normalize=True)
        return towers.loss(image, tokens.to(device))

    fit(towers, loss, plan, work, progress)
    return towers
