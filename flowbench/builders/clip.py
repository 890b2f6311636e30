"""Stage 2: mini CLIP, open_clip's own classes and file format at small size: the `clip` reward of mini-sd3."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision.transforms.functional import gaussian_blur
from transformers import CLIPTokenizer

from flowbench.builders.data import draw_captions, draw_images
from flowbench.builders.fit import FitPlan, Progress, fit, reduced_precision
from flowbench.builders.tokenizer import MAX_TOKENS
from flowbench.files import write_atomically
from flowbench.testbeds.shapes.world import Caption, mutate

PLAN = FitPlan("clip", steps=1400, lr=1.5e-3, weight_decay=0.05, warmup=200, checkpoint_every=100)
BATCH = 96


@dataclass(frozen=True)
class Widths:
    """Size of a mini CLIP: transformer widths and depths of both towers and of the joint embedding."""

    vision: int = 96
    vision_layers: int = 4
    text: int = 96
    text_layers: int = 3
    embed: int = 96


def clip_config(vocab_size: int, widths: Widths = Widths()) -> dict[str, object]:
    """An open_clip model configuration, as `open_clip_config.json` holds it."""
    return {
        "embed_dim": widths.embed,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 4,
            "width": widths.vision,
            "layers": widths.vision_layers,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": MAX_TOKENS,
            "vocab_size": vocab_size,
            "hf_tokenizer_name": "tokenizer",
            "width": widths.text,
            "heads": widths.text // 32,
            "layers": widths.text_layers,
        },
    }


def contrastive_batch(n: int, rng: np.random.Generator) -> tuple[torch.Tensor, list[Caption], list[Caption]]:
    """n scenes with their captions and, for each, the caption with one attribute changed.

    Images are slightly blurred or noisy at random, so that the model also judges pictures that no renderer drew.
    """
    captions = draw_captions(n, rng)
    images = draw_images(captions, rng)
    third = n // 3
    images[:third] = gaussian_blur(images[:third], [3, 3], [float(rng.uniform(0.2, 0.8))])
    noise = rng.normal(0, rng.uniform(0, 0.06), images[third : 2 * third].shape)
    images[third : 2 * third] += torch.from_numpy(noise.astype(np.float32))
    return images.clamp(0, 1), captions, [mutate(c, rng) for c in captions]


def info_nce(image: torch.Tensor, text: torch.Tensor, tokens: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Contrastive loss of normalised embeddings, image to text plus text to image.

    image (B, D); text (2 B, D) of tokens (2 B, L), whose second half are wrong captions: negatives for the images
    alone. Equal captions are not negatives of each other.
    """
    n = len(image)
    logits = image @ text.T * log_scale.exp().clamp(max=100)
    equal = (tokens[:n, None] == tokens[None]).all(2).float()
    into_text = F.cross_entropy(logits, equal / equal.sum(1, keepdim=True))
    square = equal[:, :n]
    return into_text + F.cross_entropy(logits[:, :n].T, square / square.sum(1, keepdim=True))


def train_clip(
    tokenizer: CLIPTokenizer, work: Path, seed: int, device: torch.device, progress: Progress, plan: FitPlan = PLAN
) -> open_clip.CLIP:
    """InfoNCE over the batch's captions plus one hard negative per image (a caption wrong in one attribute)."""
    torch.manual_seed(seed + 2)
    model = open_clip.CLIP(**clip_config(len(tokenizer))).to(device)

    def loss(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 5, step])
        images, captions, wrong = contrastive_batch(BATCH, rng)
        texts = [c.text for c in captions + wrong]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        with reduced_precision(device):
            image, text = model.encode_image(images.to(device) * 2 - 1), model.encode_text(tokens)
        image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
        return info_nce(image, text, tokens, model.logit_scale)

    fit(model, loss, plan, work, progress)
    return model


def save_clip(model: open_clip.CLIP, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the folder that `open_clip.create_model('local-dir:FOLDER')` loads, tokenizer included."""
    tokenizer.save_pretrained(folder)
    normalised = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": clip_config(len(tokenizer)), "preprocess_cfg": normalised}
    write_atomically(folder / "open_clip_config.json", json.dumps(config, indent=1) + "\n")
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if k != "attn_mask"}
    file = folder / "open_clip_model.safetensors"
    write_atomically(file, lambda place: save_file(weights, place, metadata={"format": "pt"}))
