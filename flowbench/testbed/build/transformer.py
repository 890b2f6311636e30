"""Stage 3: the SD3 transformer, trained with flow matching on the VAE's latents and the frozen text towers.

Late training captions are noisy on purpose, as captions from the web are: a share of them is wrong in one attribute. The
base model therefore draws what its prompt says most of the time and something close to it otherwise. That leaves the
headroom that reward fine-tuning is for, in a model that is able to draw everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

from ...state import load_state, save_state
from ..world import all_captions, is_compositional, mutate
from .data import draw_captions, draw_images
from .fit import FitPlan, Progress, fit, step_generator

PLAN = FitPlan("transformer", steps=16_000, lr=1.5e-3, lr_end=1e-5, warmup=300, ema=0.999, checkpoint_every=500)
BATCH = 64
POOL = 160_000  # latents encoded once; a pool of 25,000 repeats too soon
WRONG_CAPTIONS = 0.25
NOISY_FROM = 12_000  # step from which the wrong captions are used; before it every caption is true
CAPTION_DROPOUT = 0.1
SIGMA_MEAN, SIGMA_STD = 1.0, 1.2  # of logit(sigma)
T5_TOKENS = 1  # mini-sd3 has no T5; the pipeline puts zero tokens in its place, and one is enough


def new_transformer(text_width: int) -> SD3Transformer2DModel:
    """An untrained transformer of mini-sd3's shape; text_width is the width of both towers together."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=text_width,
        caption_projection_dim=128,
        pooled_projection_dim=text_width,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


@dataclass(frozen=True)
class LatentPool:
    """Latents (N, 16, 8, 8) float16 of fresh scenes with two captions each, (N,) int64 indices into `all_captions()`.

    true: the scene's own caption, or the empty prompt (one past the last) where that is no training caption;
    noisy: wrong in one attribute for a share WRONG_CAPTIONS of the scenes.
    """

    latents: torch.Tensor
    true: torch.Tensor
    noisy: torch.Tensor


@torch.no_grad()
def latent_pool(vae: AutoencoderKL, work: Path, seed: int, progress: Progress, size: int = POOL) -> LatentPool:
    """Encode the scenes once; afterwards they are read from the work folder."""
    stored = work / "latents.safetensors"
    if stored.exists():
        return LatentPool(*load_state(stored))
    captions = all_captions()
    index = {c.text: i for i, c in enumerate(captions) if not is_compositional(c)}
    device, chunk = next(vae.parameters()).device, 1000
    parts: list[tuple[torch.Tensor, ...]] = []
    for part in range(size // chunk):
        rng = np.random.default_rng([seed, 4, part])
        noisy = draw_captions(chunk, rng)
        true = [mutate(c, rng) if rng.random() < WRONG_CAPTIONS else c for c in noisy]
        with torch.autocast(device.type, torch.bfloat16):
            z = torch.cat(
                [vae.encode(x.to(device) * 2 - 1).latent_dist.mean for x in draw_images(true, rng).split(125)]
            )
        z = (z.float() - vae.config.shift_factor) * vae.config.scaling_factor
        parts.append((z.cpu().half(), *(torch.tensor([index.get(c.text, len(captions)) for c in said]) for said in (true, noisy))))
        progress("latents", (part + 1) * chunk, size, 0.0)
    pool = [torch.cat(column) for column in zip(*parts, strict=True)]
    save_state(stored, pool)
    return LatentPool(*pool)


@torch.no_grad()
def caption_embeddings(pipeline: StableDiffusion3Pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditioning of every caption of the world, with the empty prompt last: (K, tokens, width) and (K, width)."""
    texts = [c.text for c in all_captions()] + [""]
    states, pooled = [], []
    for start in range(0, len(texts), 256):
        part = texts[start : start + 256]
        embeds, _, pool, _ = pipeline.encode_prompt(
            part, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        states.append(embeds)
        pooled.append(pool)
    return torch.cat(states), torch.cat(pooled)


def train_transformer(
    pipeline: StableDiffusion3Pipeline, work: Path, seed: int, progress: Progress, plan: FitPlan = PLAN
) -> None:
    """Train `pipeline.transformer` in place with caption dropout and a weight EMA.

    Sigmas are logit-normal with their bulk towards noise: with 1,024 latent dimensions the number and place of objects
    are decided above sigma 0.8, where the usual logit-normal (0, 1) puts hardly any weight.
    """
    transformer = pipeline.transformer
    device = next(transformer.parameters()).device
    pool = latent_pool(pipeline.vae, work, seed, progress)
    states, pooled = caption_embeddings(pipeline)

    def loss(step: int) -> torch.Tensor:
        gen = step_generator(seed + 7, step)
        rows = torch.randint(len(pool.latents), (BATCH,), generator=gen)
        x0 = pool.latents[rows].float()
        label = (pool.true if step < NOISY_FROM else pool.noisy)[rows]
        label[torch.rand(BATCH, generator=gen) < CAPTION_DROPOUT] = len(states) - 1
        eps = torch.randn(x0.shape, generator=gen)
        sigma = torch.sigmoid(SIGMA_MEAN + SIGMA_STD * torch.randn(BATCH, generator=gen))
        x0, eps, sigma, label = (t.to(device) for t in (x0, eps, sigma, label))
        s = sigma[:, None, None, None]
        v = transformer((1 - s) * x0 + s * eps, states[label], pooled[label], timestep=sigma * 1000, return_dict=False)[
            0
        ]
        return (v - (eps - x0)).square().mean()

    fit(transformer, loss, plan, work, progress)
