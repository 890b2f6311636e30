"""CLIP similarity of image and prompt, by any open_clip model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from flowbench.errors import RunError, UsageError
from flowbench.presets import resolve_weights
from flowbench.reward import Reward, register_reward


@register_reward(
    "clip",
    source="2103.00020; open_clip",
    licence="MIT (open_clip); the weights' own licence applies",
    range=(-1.0, 1.0),
    differentiable=True,
)
class Clip(Reward):
    """Cosine of the CLIP embeddings of image and prompt.

    model: an open_clip name with its `pretrained` tag (or a weights file), or a folder in open_clip's own format.
    """

    def __init__(self, model: str = "ViT-H-14", pretrained: str | None = None) -> None:
        self.model_name, self.pretrained = model, pretrained

    def load(self, device: torch.device) -> None:
        import open_clip

        source = resolve_weights(self.model_name)
        folder = Path(source)
        if source == self.model_name and not folder.is_dir():
            if source not in open_clip.list_models():
                raise UsageError(f"reward 'clip': open_clip knows no model '{source}', and it is no folder")
        else:
            source = f"local-dir:{folder}"
        try:
            self.model = open_clip.create_model(source, pretrained=self.pretrained, device=device).eval()
            self.tokenizer = open_clip.get_tokenizer(source)
        except (OSError, RuntimeError, ValueError) as error:
            raise RunError(
                f"reward 'clip' cannot load '{self.model_name}' ({self.pretrained}): {str(error).splitlines()[0]}; "
                "fetch the weights on a machine with a network, or give a local file as its `pretrained`"
            ) from error
        self.model.requires_grad_(False)
        self.device = device
        mean, std = self.model.visual.image_mean, self.model.visual.image_std
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]
        self._text: dict[str, torch.Tensor] = {}

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        size = self.model.visual.image_size
        side = (size, size) if isinstance(size, int) else tuple(size)
        x = images.to(self.device)
        if tuple(x.shape[-2:]) != side:
            x = F.interpolate(x, side, mode="bicubic", antialias=True).clamp(0, 1)
        image = self.model.encode_image((x - self.mean) / self.std, normalize=True)
        return (image * self._encode_text(prompts)).sum(1)

    def provenance(self) -> dict[str, Any]:
        return {"model": self.model_name, "pretrained": self.pretrained}

    @torch.no_grad()
    def _encode_text(self, prompts: tuple[str, ...]) -> torch.Tensor:
        new = [p for p in dict.fromkeys(prompts) if p not in self._text]
        if new:
            encoded = self.model.encode_text(self.tokenizer(new).to(self.device), normalize=True)
            self._text.update(zip(new, encoded, strict=True))
        return torch.stack([self._text[p] for p in prompts])
