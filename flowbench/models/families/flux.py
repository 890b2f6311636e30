"""FLUX.1: packed latents, position ids, sigmas shifted by resolution, and guidance that is an input of the model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from flowbench.errors import UsageError
from flowbench.models.families.base import Family, NamedTensors, shift_for


class Flux(Family):
    """diffusers' FluxPipeline. Text: tokens (L, D) of T5 and pooled (D',) of CLIP.

    FLUX.1-dev is distilled from a guided model and takes the guidance scale as an input, FLUX.1-schnell takes none.
    """

    name = "flux"
    classifier_free = False
    spaced_evenly = True
    lora_targets: ClassVar = (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    )
    text_encoders: ClassVar = ("text_encoder", "text_encoder_2")

    def encode(self, prompts: list[str], device: torch.device) -> list[NamedTensors]:
        """As in the base class; all prompts have the same length, and padding is not masked."""
        tokens, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=device, max_sequence_length=self.preset.max_sequence_length
        )
        return [{"tokens": t, "pooled": p} for t, p in zip(tokens, pooled, strict=True)]

    @property
    def text_width(self) -> int:
        """The width of CLIP's pooled embedding."""
        return int(self.transformer.config.pooled_projection_dim)

    def summarize(self, text: NamedTensors) -> torch.Tensor:
        """CLIP's pooled embedding."""
        return text["pooled"]

    def _tokenizer(self) -> Any:
        return self.pipeline.tokenizer_2

    def predict(
        self, module: torch.nn.Module, x: torch.Tensor, sigma: torch.Tensor, text: NamedTensors, scale: float
    ) -> torch.Tensor:
        """As in the base class; the model's time is sigma.

        Raises UsageError for a guidance scale above 1 if the model takes none.
        """
        takes_guidance = self.transformer.config.guidance_embeds
        if scale > 1 and not takes_guidance:
            raise UsageError(f"model '{self.preset.name}' takes no guidance; set guidance_scale to 1")
        v = module(
            pack(x),
            encoder_hidden_states=text["tokens"],
            pooled_projections=text["pooled"],
            timestep=sigma,
            guidance=torch.full_like(sigma, scale) if takes_guidance else None,
            txt_ids=torch.zeros(text["tokens"].shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=position_ids(x),
            return_dict=False,
        )[0]
        return unpack(v, x.shape[2:])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """As in the base class, before packing; the sides are even."""
        return (self.transformer.config.in_channels // 4, *self.latent_size())

    def shift_arguments(self) -> dict[str, float]:
        """As in the base class; by the number of image tokens."""
        _, h, w = self.latent_shape
        return {"mu": shift_for(self.pipeline.scheduler, h * w // 4)}


def pack(x: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) as tokens (B, h w / 4, 4 C), each a square of two by two."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """The inverse of `pack`; size (h, w)."""
    (b, _, c), (h, w) = tokens.shape, size
    return tokens.view(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def position_ids(x: torch.Tensor) -> torch.Tensor:
    """(h w / 4, 3): zero, row and column of each token of latents (B, C, h, w)."""
    rows, columns = (torch.arange(n // 2, device=x.device, dtype=x.dtype) for n in x.shape[2:])
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
    return torch.nn.functional.pad(grid, (1, 0))
