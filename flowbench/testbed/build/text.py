"""Stage 2: mini-sd3's text path: a word-level CLIP vocabulary and two frozen contrastive text towers, as in SD3."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ..world import all_captions
from .data import draw_captions, draw_images
from .fit import FitPlan, Progress, fit

MAX_TOKENS = 16
WIDTH = 96
PLAN = FitPlan("text", steps=700, lr=2e-3, weight_decay=0.05, checkpoint_every=200)
BATCH = 96
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write CLIP's vocab.json and merges.txt with one token per word of the world; any other text still tokenises."""
    words = sorted({word for c in all_captions() for word in c.text.split()} | {"photo", "picture", "of", "shape"})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = alphabet + [a + "</w>" for a in alphabet] + [a + b for a, b in merges] + [_START, _END]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=_END,
        bos_token=_START,
        eos_token=_END,
        pad_token=_END,
        model_max_length=MAX_TOKENS,
    )
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


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
    """Both text towers and the image tower they are contrasted with; the image tower is thrown away."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.first = CLIPTextModelWithProjection(text_config(tokenizer, "quick_gelu"))
        self.second = CLIPTextModelWithProjection(text_config(tokenizer, "gelu"))
        self.image = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=3 * WIDTH,
                projection_dim=2 * WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=32,
                patch_size=4,
            )
        )
        self.log_temperature = nn.Parameter(torch.tensor(2.6))

    def loss(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """InfoNCE of each text tower against its half of the image embedding; equal captions are not negatives."""
        halves = self.image(pixel_values=images * 2 - 1).image_embeds.float().split(WIDTH, dim=1)
        equal = (tokens[:, None] == tokens[None]).all(2).float()
        target = equal / equal.sum(1, keepdim=True)
        total = torch.zeros((), device=images.device)
        for tower, image in zip((self.first, self.second), halves, strict=True):
            text = tower(input_ids=tokens).text_embeds.float()
            logits = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T * self.log_temperature.exp()
            total = total + F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        return total / 4


def train_text_towers(
    tokenizer: CLIPTokenizer, work: Path, seed: int, device: torch.device, progress: Progress, plan: FitPlan = PLAN
) -> TwoTowers:
    """Train both towers contrastively on the world's captions."""
    torch.manual_seed(seed + 1)
    towers = TwoTowers(tokenizer).to(device)

    def loss(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 3, step])
        captions = draw_captions(BATCH, rng)
        images = draw_images(captions, rng).to(device)
        tokens = tokenizer(
            [c.text for c in captions], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        with torch.autocast(device.type, torch.bfloat16):
            return towers.loss(images, tokens.to(device))

    fit(towers, loss, plan, work, progress)
    return towers
