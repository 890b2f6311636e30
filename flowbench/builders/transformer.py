"""Stage 4: the SD3 transformer, trained with flow matching on the VAE's latents and the frozen text towers.

Trained without guidance, the model mixes up attributes of two objects, and classifier-free guidance mends part of that
at twice the cost. A last stage distils the guided velocity into the model (2210.03142), so that it is sampled without
guidance. Binding, counting and relations still fail often: the headroom that reward fine-tuning is for.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

from flowbench.builders.data import draw_captions, draw_images
from flowbench.builders.fit import FitPlan, Progress, fit, step_generator
from flowbench.models.flow import interpolate
from flowbench.testbeds.shapes.world import all_captions
from flowbench.training.state import load_state, save_state

PLAN = FitPlan("transformer", steps=6800, lr=1.5e-3, lr_end=1e-5, warmup=300, ema=0.999, checkpoint_every=500)
DISTIL = FitPlan("distil", steps=800, lr=4e-4, lr_end=1e-6, warmup=50, ema=0.99, checkpoint_every=250)
GUIDANCE = 3.0
BATCH = 64
POOL = 160_000  # latents encoded once; a pool of 25,000 repeats too soon
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
    """Latents (N, 16, 8, 8) float16 of fresh scenes, and the index (N,) of each one's caption in `all_captions()`."""

    latents: torch.Tensor
    label: torch.Tensor


@torch.no_grad()
def latent_pool(vae: AutoencoderKL, work: Path, seed: int, progress: Progress, size: int = POOL) -> LatentPool:
    """Encode the scenes once; afterwards they are read from the work folder."""
    stored = work / "latents.safetensors"
    if stored.exists():
        return LatentPool(*load_state(stored))
    index = {c.text: i for i, c in enumerate(all_captions())}
    device, chunk = next(vae.parameters()).device, 1000
    latents, labels = [], []
    for part in range(size // chunk):
        rng = np.random.default_rng([seed, 4, part])
        captions = draw_captions(chunk, rng)
        images = draw_images(captions, rng)
        z = torch.cat([vae.encode(x.to(device) * 2 - 1).latent_dist.mean for x in images.split(125)])
        latents.append(((z - vae.config.shift_factor) * vae.config.scaling_factor).cpu().half())
        labels.append(torch.tensor([index[c.text] for c in captions]))
        progress("latents", (part + 1) * chunk, size, 0.0)
    pool = LatentPool(torch.cat(latents), torch.cat(labels))
    save_state(stored, [pool.latents, pool.label])
    return pool


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


@dataclass(frozen=True)
class Data:
    """What both stages learn from: latents, and the conditioning of every caption with the empty prompt last."""

    pool: LatentPool
    states: torch.Tensor
    pooled: torch.Tensor

    @property
    def empty(self) -> int:
        """Index of the empty prompt."""
        return len(self.states) - 1


def load_data(pipeline: StableDiffusion3Pipeline, work: Path, seed: int, progress: Progress) -> Data:
    """Encode scenes and captions with the pipeline's own VAE and text towers."""
    return Data(latent_pool(pipeline.vae, work, seed, progress), *caption_embeddings(pipeline))


@dataclass(frozen=True)
class NoisyBatch:
    """x_sigma (B, 16, 8, 8) at sigma (B,), its target velocity u, and caption indices (B,), some the empty prompt's."""

    x: torch.Tensor
    sigma: torch.Tensor
    u: torch.Tensor
    label: torch.Tensor


def draw_batch(data: Data, seed: int, step: int, device: torch.device) -> NoisyBatch:
    """A batch for one step, a function of seed and step alone.

    Sigmas are logit-normal with their bulk towards noise: with 1,024 latent dimensions the number and place of objects
    are decided above sigma 0.8, where the usual logit-normal (0, 1) puts hardly any weight.
    """
    gen = step_generator(seed, step)
    rows = torch.randint(len(data.pool.latents), (BATCH,), generator=gen)
    x0, label = data.pool.latents[rows].float(), data.pool.label[rows]
    label[torch.rand(BATCH, generator=gen) < CAPTION_DROPOUT] = data.empty
    eps = torch.randn(x0.shape, generator=gen)
    sigma = torch.sigmoid(SIGMA_MEAN + SIGMA_STD * torch.randn(BATCH, generator=gen))
    return NoisyBatch(*(t.to(device) for t in (interpolate(x0, eps, sigma), sigma, eps - x0, label)))


def train_transformer(
    transformer: SD3Transformer2DModel, data: Data, work: Path, seed: int, progress: Progress, plan: FitPlan = PLAN
) -> None:
    """Train the transformer in place with caption dropout and a weight EMA."""
    device = next(transformer.parameters()).device

    def loss(step: int) -> torch.Tensor:
        b = draw_batch(data, seed + 7, step, device)
        return (velocity(transformer, data, b, b.label) - b.u).square().mean()

    fit(transformer, loss, plan, work, progress)


def velocity(transformer: SD3Transformer2DModel, data: Data, b: NoisyBatch, label: torch.Tensor) -> torch.Tensor:
    """v(x_sigma, sigma, c) for captions label (B,); (B, 16, 8, 8)."""
    v: torch.Tensor = transformer(
        b.x, data.states[label], data.pooled[label], timestep=b.sigma * 1000, return_dict=False
    )[0]
    return v


@torch.no_grad()
def guided_velocity(
    transformer: SD3Transformer2DModel, data: Data, b: NoisyBatch, scale: float = GUIDANCE
) -> torch.Tensor:
    """The velocity under classifier-free guidance (2207.12598)."""
    v_empty = velocity(transformer, data, b, torch.full_like(b.label, data.empty))
    return v_empty + scale * (velocity(transformer, data, b, b.label) - v_empty)


def distil_guidance(
    student: SD3Transformer2DModel, data: Data, work: Path, seed: int, progress: Progress, plan: FitPlan = DISTIL
) -> None:
    """Train the transformer in place to give the velocity that it had with guidance (2210.03142, stage one)."""
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    device = next(student.parameters()).device

    def loss(step: int) -> torch.Tensor:
        b = draw_batch(data, seed + 8, step, device)
        return (velocity(student, data, b, b.label) - guided_velocity(teacher, data, b)).square().mean()

    fit(student, loss, plan, work, progress)
