"""open_clip's models as the rewards use them: image and text embeddings of unit length."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flowbench.errors import RunError, UsageError
from flowbench.models.presets import EMBEDDED, resolve_weights
from flowbench.reading.tensors import TensorError, check_dtypes, check_values
from flowbench.scoring.checkpoints import Weights, are_random, brief, load_strictly, read_tensors
from flowbench.scoring.networks import NetworkReward, is_longer
from flowbench.testbeds.shapes.weights import check_shipped


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


class ClipTowers:
    """Both towers of an open_clip model, frozen."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model.eval().requires_grad_(False), tokenizer, device
        self.dtype = torch.float32
        size = model.visual.image_size
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        self.mean = torch.tensor(model.visual.image_mean, device=device)[:, None, None]
        self.std = torch.tensor(model.visual.image_std, device=device)[:, None, None]

    def embed_images(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D) of images (B, 3, *size) in [0, 1]."""
        embedding = self.model.encode_image(((x - self.mean) / self.std).to(self.dtype))
        return torch.nn.functional.normalize(embedding.float(), dim=-1)

    @torch.no_grad()
    def embed_prompts(self, prompts: tuple[str, ...]) -> torch.Tensor:
        """Embeddings (B, D) of prompts."""
        # All of a call, not those that are new: in such a batch the last bits would depend on what came before.
        unique = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
        text = self.model.encode_text(self.tokenizer(list(unique)).to(self.device))
        return torch.nn.functional.normalize(text.float(), dim=-1)[[unique[p] for p in prompts]]

    def cuts(self, prompt: str) -> bool:
        """Whether a prompt has more tokens than the text tower reads."""
        whole = self.tokenizer

        def count(text: str) -> int:
            plain = hasattr(whole, "encode")  # open_clip's own tokenizer, without the two special ones
            return len(whole.encode(text)) + 2 if plain else len(whole.tokenizer(text).input_ids)

        return is_longer(prompt, whole.context_length, count)

    def to(self, device: torch.device) -> None:
        """Move both towers."""
        self.model.to(device)
        self.device, self.mean, self.std = device, self.mean.to(device), self.std.to(device)

    def halve(self) -> None:
        """Compute both embeddings in float16; their length is still made 1 in float32."""
        self.model.half()
        self.dtype = torch.float16


class TowersReward(NetworkReward):
    """A reward that is the cosine of a model's embeddings of image and prompt; `load` makes its `towers`."""

    towers: ClipTowers

    def networks(self) -> tuple[torch.nn.Module, ...]:
        """As in the base class."""
        return (self.towers.model,)

    def to(self, device: torch.device) -> None:
        """As in the base class."""
        self.towers.to(device)

    def cuts(self, prompt: str) -> bool:
        """As in the base class."""
        return self.towers.cuts(prompt)

    def cosine(self, x: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """Of preprocessed images (B, 3, *size) in [0, 1] and their prompts, (B,)."""
        return (self.towers.embed_images(x) * self.towers.embed_prompts(prompts)).sum(1)

    def _half(self) -> None:
        self.towers.halve()


def _hub_id(name: str, tag: str | None) -> str:
    """The hub repository of a model's tag; "" for none."""
    import open_clip

    return str((open_clip.get_pretrained_cfg(name, tag) or {}).get("hf_hub", "")).strip("/") if tag else ""


def clip_weights(name: str, tag: str | None) -> Weights:
    """The files that `load_towers` reads; of a folder all of them."""
    hub_id = _hub_id(name, tag)
    if hub_id:
        return Weights(hub_id, ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"))
    return Weights(tag or name, ("open_clip_config.json",), whole=True)


def load_towers(reward: str, name: str, tag: str | None, device: torch.device) -> ClipTowers:
    """An open_clip model by name with its `pretrained` tag or weights file, or from a folder in open_clip's format.

    A tag's hub repository is looked for below FLOWBENCH_WEIGHTS first.
    Raises UsageError for a name that open_clip does not know, RunError, with the remedy, when weights are missing.
    """
    import open_clip

    hub_id = _hub_id(name, tag)
    folder, where = Path(resolve_weights(hub_id or name)), tag
    if folder.is_dir():
        source, where = f"local-dir:{folder}", None
    elif name in open_clip.list_models():
        source = name
    elif name.startswith(EMBEDDED):
        raise RunError(f"reward '{reward}' has no weights in {folder}; rebuild them with 'flowbench testbed build'")
    else:
        raise UsageError(f"reward '{reward}': open_clip knows no model '{name}', and it is no folder")
    if not are_random():
        check_shipped(folder)
    try:
        with _quiet():
            if are_random():
                with torch.device(device):
                    model = open_clip.create_model(source, device=device, load_weights=False)
            else:
                for file in sorted(folder.glob("*.safetensors")):
                    check_dtypes(file)
                model = open_clip.create_model(source, where, device=device, require_pretrained=True)
                check_values(model.state_dict())
            return ClipTowers(model, open_clip.get_tokenizer(source), device)
    except TensorError as error:
        raise RunError(f"reward '{reward}': '{folder if folder.is_dir() else name}' {error}; fetch it again") from error
    except (OSError, RuntimeError, ValueError) as error:
        fetch = f"fetch them with 'hf download {hub_id}', put that folder below FLOWBENCH_WEIGHTS, or "
        raise RunError(
            f"reward '{reward}' cannot load the weights of '{name}' ({tag}): {brief(error)}; "
            f"{fetch if hub_id else ''}give a local weights file as `pretrained` in the model's preset"
        ) from error


def load_checkpoint(reward: str, architecture: str, path: Path, device: torch.device) -> ClipTowers:
    """A model of open_clip's architecture with the weights of a safetensors file, every one accounted for.

    Raises RunError for a file that does not fit.
    """
    import open_clip

    tensors = read_tensors(reward, path)
    with _quiet():
        model = open_clip.create_model(architecture, device=device)
    load_strictly(reward, path, model, tensors)
    return ClipTowers(model, open_clip.get_tokenizer(architecture), device)
