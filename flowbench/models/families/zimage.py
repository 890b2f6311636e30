"""Z-Image: rows are lists, prompts ragged, time runs from noise at 0 to the image at 1."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from flowbench.models.families.base import Family, NamedTensors, shift_for


class ZImage(Family):
    """diffusers' ZImagePipeline. Text: tokens (L, D) of Qwen3 without padding, and mask (L,), all True.

    A guidance scale of flowbench is the pipeline's own plus 1, so that 1 is none, as everywhere.
    """

    name = "zimage"
    spaced_evenly = True
    lora_targets: ClassVar = tuple(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))

    def encode(self, prompts: list[str], device: torch.device) -> list[NamedTensors]:
        """As in the base class; each prompt keeps its own length."""
        tokens, _ = self.pipeline.encode_prompt(
            list(prompts),  # the pipeline writes into it
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.preset.max_sequence_length,
        )
        return [{"tokens": t, "mask": torch.ones(len(t), dtype=torch.bool, device=t.device)} for t in tokens]

    @property
    def text_width(self) -> int:
        """The width of Qwen3's tokens."""
        return int(self.transformer.config.cap_feat_dim)

    def summarize(self, text: NamedTensors) -> torch.Tensor:
        """The mean of the tokens."""
        mask = text["mask"][:, :, None]
        return (text["tokens"].float() * mask).sum(1) / mask.sum(1)

    def count_tokens(self, prompt: str) -> int:
        """As in the base class; the chat's markers around the prompt count."""
        chat = self.pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return super().count_tokens(chat)

    def predict(
        self, module: torch.nn.Module, x: torch.Tensor, sigma: torch.Tensor, text: NamedTensors, scale: float
    ) -> torch.Tensor:
        """As in the base class; the model's time is 1 - sigma, and it gives x0 - eps."""
        frames = list(x.contiguous().unsqueeze(2).unbind(0))  # each (C, 1, h, w)
        prompts = [tokens[mask] for tokens, mask in zip(text["tokens"], text["mask"], strict=True)]
        v = module(frames, 1 - sigma, prompts, return_dict=False)[0]
        return -torch.stack([each.squeeze(1) for each in v])

    def call_arguments(self, num_steps: int, scale: float) -> dict[str, Any]:
        """As in the base class; the pipeline counts guidance from 0."""
        return {**super().call_arguments(num_steps, scale), "guidance_scale": scale - 1}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """As in the base class; the sides are even."""
        return (self.transformer.config.in_channels, *self.latent_size())

    def shift_arguments(self) -> dict[str, float]:
        """As in the base class; by the number of image tokens, where the scheduler asks for it."""
        _, h, w = self.latent_shape
        return {"mu": shift_for(self.pipeline.scheduler, h * w // 4)}
