"""Stable Diffusion 3 and 3.5: two CLIP towers and T5, joint attention; its convention is flowbench's own."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from flowbench.models.families.base import Family, NamedTensors, Parts, shift_for

if TYPE_CHECKING:
    from flowbench.models.presets import ModelPreset


class StableDiffusion3(Family):
    """diffusers' StableDiffusion3Pipeline. Text: tokens (L, D) and pooled (D',)."""

    name = "sd3"
    # attn2 is the second attention of SD3.5 medium's dual-attention blocks; SD3 has none.
    lora_targets: ClassVar = (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    )
    text_encoders: ClassVar = ("text_encoder", "text_encoder_2", "text_encoder_3")

    @classmethod
    def load(cls, preset: ModelPreset, device: torch.device, parts: Parts = "all") -> Any:
        """As in the base class."""
        pipeline = super().load(preset, device, parts)
        if parts == "text" and not preset.has_t5:
            from diffusers import SD3Transformer2DModel

            # In place of T5's tokens the pipeline puts zeros, whose width it reads from the transformer.
            source = preset.resolve_source()
            config = SD3Transformer2DModel.load_config(source, subfolder="transformer", revision=preset.revision)
            vars(pipeline)["transformer"] = SimpleNamespace(config=SimpleNamespace(**config))
        return pipeline

    @classmethod
    def left_out(cls, preset: ModelPreset) -> tuple[str, ...]:
        """T5, where the preset has none."""
        return () if preset.has_t5 else ("text_encoder_3", "tokenizer_3")

    def encode(self, prompts: list[str], device: torch.device) -> list[NamedTensors]:
        """As in the base class; all prompts have the same length."""
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.preset.max_sequence_length,
        )
        return [{"tokens": t, "pooled": p} for t, p in zip(tokens, pooled, strict=True)]

    @property
    def text_width(self) -> int:
        """The width of the pooled embedding."""
        return int(self.transformer.config.pooled_projection_dim)

    def summarize(self, text: NamedTensors) -> torch.Tensor:
        """The pooled embedding."""
        return text["pooled"]

    @property
    def token_limit(self) -> int:
        """T5's limit where there is T5, else CLIP's."""
        return self.preset.max_sequence_length if self.preset.has_t5 else int(self.pipeline.tokenizer_max_length)

    def _tokenizer(self) -> Any:
        return self.pipeline.tokenizer_3 if self.preset.has_t5 else self.pipeline.tokenizer

    def predict(
        self, module: torch.nn.Module, x: torch.Tensor, sigma: torch.Tensor, text: NamedTensors, scale: float
    ) -> torch.Tensor:
        """As in the base class; the model's time is 1000 sigma."""
        v: torch.Tensor = module(x, text["tokens"], text["pooled"], timestep=sigma * 1000, return_dict=False)[0]
        return v

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """As in the base class."""
        return (self.transformer.config.in_channels, *self.latent_size(self.transformer.config.patch_size))

    @classmethod
    def multiple(cls, vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> int:
        """As in the base class, with the transformer's own patches."""
        return super().multiple(vae, transformer) // 2 * int(transformer.get("patch_size", 2))

    def shift_arguments(self) -> dict[str, float]:
        """As in the base class; by the number of image tokens, where the scheduler asks for it."""
        scheduler = self.pipeline.scheduler
        if not scheduler.config.get("use_dynamic_shifting"):
            return {}
        _, h, w = self.latent_shape
        return {"mu": shift_for(scheduler, h * w // self.transformer.config.patch_size**2)}
