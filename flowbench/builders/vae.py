"""Stage 1: the autoencoder, diffusers' AutoencoderKL with 16 latent channels at a quarter of the resolution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from flowbench.builders.data import draw_captions, draw_images
from flowbench.builders.fit import FitPlan, Progress, fit, reduced_precision, step_generator
from flowbench.testbeds.shapes.world import Caption

PLAN = FitPlan("vae", steps=3200, lr=2e-3, weight_decay=0.0, checkpoint_every=200)
CROSSES = FitPlan("vae-crosses", steps=300, lr=5e-4, weight_decay=0.0, warmup=20, checkpoint_every=100)
BATCH = 48


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder of mini-sd3's shape: (B, 3, 32, 32) to (B, 16, 8, 8)."""
    return AutoencoderKL(
        block_out_channels=(24, 48, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def train_vae(work: Path, seed: int, device: torch.device, progress: Progress) -> AutoencoderKL:
    """Train on renders with L1 + 2 MSE and a tiny KL, then set scaling_factor and shift_factor from the latents.

    Small crosses are what a blur turns into circles, and nearly all verdicts that a round trip changes are theirs: the
    last steps draw many of them.
    """
    torch.manual_seed(seed)
    vae = new_vae().to(device, memory_format=torch.channels_last)  # faster on a CPU

    def loss(captions: list[Caption], rng: np.random.Generator, step: int) -> torch.Tensor:
        x = draw_images(captions, rng) * 2 - 1
        x = x.to(device, memory_format=torch.channels_last)
        with reduced_precision(device):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=step_generator(seed, step)).to(device)
            error = vae.decode(posterior.mean + posterior.std * noise).sample.float() - x
        # Objects never touch a corner, so its pixel is the background; objects carry the meaning and count three times.
        weight = 1 + 2 * (x - x[:, :, :1, :1]).abs().gt(0.1).any(1, keepdim=True)
        return (weight * (error.abs() + 2 * error**2)).mean() + 1e-6 * posterior.kl().float().mean()

    def on_all(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 1, step])
        return loss(draw_captions(BATCH, rng), rng, step)

    def on_crosses(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 3, step])
        return loss(draw_crosses(BATCH // 2, rng) + draw_captions(BATCH // 2, rng), rng, step)

    fit(vae, on_all, PLAN, work, progress)
    fit(vae, on_crosses, CROSSES, work, progress)
    vae.to(memory_format=torch.contiguous_format)  # as safetensors wants it
    set_latent_scale(vae, seed)
    return vae


def draw_crosses(n: int, rng: np.random.Generator) -> list[Caption]:
    """n training captions of scenes with a cross that may be small."""
    crosses: list[Caption] = []
    while len(crosses) < n:
        drawn = draw_captions(4 * n, rng)
        crosses += [c for c in drawn if any(o.shape == "cross" and o.size != "large" for o in c.objects)]
    return crosses[:n]


@torch.no_grad()
def set_latent_scale(vae: AutoencoderKL, seed: int) -> None:
    """Set the factors with which SD3's pipeline brings latents to mean 0 and variance 1."""
    rng = np.random.default_rng([seed, 2])
    device = next(vae.parameters()).device
    x = (draw_images(draw_captions(1024, rng), rng) * 2 - 1).to(device)
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(128)])
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4), shift_factor=round(z.mean().item(), 4))
