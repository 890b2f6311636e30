"""CLIP similarity of image and prompt, by any open_clip model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from flowbench.errors import RunError, UsageError
from flowbench.lazy import no_grad
from flowbench.presets import EMBEDDED, resolve_weights
from flowbench.reward import Reward, register_reward


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs to the root logger what its exceptions say again."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(level)


@register_reward(
    "clip",
    source="2103.00020; open_clip",
    licence="MIT (open_clip); the weights' own licence applies",
    range=(-1.0, 1.0),
    differentiable=True,
)
class Clip(Reward):
    """Cosine of the CLIP embeddings of image and prompt.

    model: an open_clip name with its `pretrained` tag or weights file, or a folder in open_clip's own format. A tag's
    hub repository is looked for below FLOWBENCH_WEIGHTS first.
    """

    def __init__(self, model: str = "ViT-H-14", pretrained: str | None = None) -> None:
        self.model_name, self.pretrained = model, pretrained

    def load(self, device: torch.device) -> None:
        import open_clip

        name, tag = self.model_name, self.pretrained
        hub_id = str((open_clip.get_pretrained_cfg(name, tag) or {}).get("hf_hub", "")).strip("/") if tag else ""
        folder = Path(resolve_weights(hub_id or name))
        if folder.is_dir():
            source, tag = f"local-dir:{folder}", None
        elif name in open_clip.list_models():
            source = name
        elif name.startswith(EMBEDDED):
            raise RunError(f"reward 'clip' has no weights in {folder}; rebuild them with 'flowbench testbed build'")
        else:
            raise UsageError(f"reward 'clip': open_clip knows no model '{name}', and it is no folder")
        try:
            with _quiet():
                self.model = open_clip.create_model(source, tag, device=device, require_pretrained=True).eval()
                self.tokenizer = open_clip.get_tokenizer(source)
        except (OSError, RuntimeError, ValueError) as error:
            fetch = f"fetch them with 'hf download {hub_id}', put that folder below FLOWBENCH_WEIGHTS, or "
            raise RunError(
                f"reward 'clip' cannot load the weights of '{name}' ({self.pretrained}): "
                f"{shorten(str(error), 140, placeholder=' ...')}; {fetch if hub_id else ''}"
                "give a local weights file as `pretrained` in the model's preset"
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
            x = torch.nn.functional.interpolate(x, side, mode="bicubic", antialias=True).clamp(0, 1)
        image = self.model.encode_image((x - self.mean) / self.std, normalize=True)
        return (image * self._encode_text(prompts)).sum(1)

    def provenance(self) -> dict[str, Any]:
        return {"model": self.model_name, "pretrained": self.pretrained, "sha256": self._fingerprint()}

    def _fingerprint(self) -> str:
        """Hash of the loaded weights, whatever file they came from."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @no_grad
    def _encode_text(self, prompts: tuple[str, ...]) -> torch.Tensor:
        # One at a time: in a batch, the last bits would depend on which prompts came before, and so on resuming.
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._text:
                self._text[prompt] = self.model.encode_text(self.tokenizer([prompt]).to(self.device), normalize=True)[0]
        return torch.stack([self._text[p] for p in prompts])
