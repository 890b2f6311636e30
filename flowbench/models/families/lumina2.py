"""Lumina Image 2.0: time runs from noise at 0 to the image at 1, text has masked tokens, guidance keeps the norm."""

from __future__ import annotations

from typing import ClassVar

import torch

from flowbench.models.families.base import Family, NamedTensors, shift_for


class Lumina2(Family):
    """diffusers' Lumina2Pipeline. Text: tokens (L, D) of Gemma without padding, and mask (L,), all True.

    A prompt follows the pipeline's system prompt; the negative prompt of guidance stands alone.
    """

    name = "lumina2"
    spaced_evenly = True
    lora_targets: ClassVar = tuple(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))

    def encode(self, prompts: list[str], device: torch.device) -> list[NamedTensors]:
        """As in the base class; each prompt keeps its own length."""
        tokens, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=device,
            max_sequence_length=self.preset.max_sequence_length,
        )
        return [_without_padding(t, m) for t, m in zip(tokens, mask, strict=True)]

    def encode_negative(self, device: torch.device) -> NamedTensors:
        """The empty prompt without the system prompt."""
        _, _, tokens, mask = self.pipeline.encode_prompt(
            [""],
            do_classifier_free_guidance=True,
            device=device,
            max_sequence_length=self.preset.max_sequence_length,
        )
        return _without_padding(tokens[0], mask[0])

    @property
    def text_width(self) -> int:
        """The width of Gemma's tokens."""
        return int(self.transformer.config.cap_feat_dim)

    def summarize(self, text: NamedTensors) -> torch.Tensor:
        """The mean of the tokens."""
        mask = text["mask"][:, :, None]
        return (text["tokens"].float() * mask).sum(1) / mask.sum(1)

    def count_tokens(self, prompt: str) -> int:
        """As in the base class; the system prompt counts."""
        return super().count_tokens(f"{self.pipeline.system_prompt} <Prompt Start> {prompt}")

    def predict(
        self, module: torch.nn.Module, x: torch.Tensor, sigma: torch.Tensor, text: NamedTensors, scale: float
    ) -> torch.Tensor:
        """As in the base class; the model's time is 1 - sigma, and it gives x0 - eps."""
        v: torch.Tensor = module(
            hidden_states=x,
            timestep=1 - sigma,
            encoder_hidden_states=text["tokens"],
            encoder_attention_mask=text["mask"],
            return_dict=False,
        )[0]
        return -v

    def guide(self, v: torch.Tensor, v_negative: torch.Tensor, scale: float) -> torch.Tensor:
        """Classifier-free guidance, brought back to the norm of v along the last axis, as the pipeline does it."""
        guided = super().guide(v, v_negative, scale)
        return guided * (v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """As in the base class; the sides are even."""
        return (self.transformer.config.in_channels, *self.latent_size())

    def shift_arguments(self) -> dict[str, float]:
        """As in the base class, where the scheduler asks for it."""
        # The pipeline takes the latent's second axis, its channels, for the number of tokens.
        return {"mu": shift_for(self.pipeline.scheduler, self.latent_shape[0])}


def _without_padding(tokens: torch.Tensor, mask: torch.Tensor) -> NamedTensors:
    length = max(1, int(mask.sum()))  # padding is on the right
    return {"tokens": tokens[:length], "mask": mask[:length].bool()}
