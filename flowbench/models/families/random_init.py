"""Pipelines with a model's real configuration and random weights: to time a card, or to compute what a run will need.

The configurations in models/configurations are facts about public checkpoints (their config.json files). They come
without tokenizers, so that nothing is needed beyond this package; a text is then encoded as random numbers of the right
shape. A local folder has tokenizers, and its text encoders are made, with random weights too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowbench.errors import UsageError

if TYPE_CHECKING:
    from flowbench.models.presets import ModelPreset

SHIPPED = Path(__file__).parent.parent / "configurations"
INDEX = "model_index.json"
TEXT_SCALE = 0.1  # about the deviation of T5's embeddings
UNWANTED: Mapping[str, tuple[str, ...]] = {"all": (), "text": ("transformer", "vae"), "rest": ("text_encoder",)}
Within = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Part:
    """One component of a pipeline: its class in diffusers or transformers, and its configuration or its folder."""

    library: str
    cls: str
    config: Mapping[str, Any]
    folder: Path | None = None

    @property
    def kind(self) -> Any:
        """The class."""
        import importlib

        return getattr(importlib.import_module(self.library), self.cls)

    @property
    def is_network(self) -> bool:
        """Whether it has weights."""
        return isinstance(self.kind, type) and issubclass(self.kind, torch.nn.Module)

    def make(self) -> Any:
        """The component, with random weights if it has any."""
        if self.library == "diffusers":
            return self.kind.from_config(dict(self.config))
        if self.is_network:
            return self.kind(self.kind.config_class(**self.config))
        return self.kind.from_pretrained(self.folder)


@dataclass(frozen=True)
class Blueprint:
    """A pipeline's class and its parts by name; tokens: whether its tokenizers are among them."""

    pipeline: str
    parts: Mapping[str, Part]

    @property
    def has_tokenizers(self) -> bool:
        """Whether texts can be encoded."""
        return any(name.startswith("tokenizer") for name in self.parts)


def blueprint(preset: ModelPreset) -> Blueprint:
    """What the preset's pipeline is made of, from its local folder or from the configurations that flowbench has.

    Raises UsageError where there is neither.
    """
    folder, shipped = Path(preset.resolve_source()), SHIPPED / f"{preset.source.replace('/', '+')}.json"
    if shipped.is_file():
        content = json.loads(shipped.read_text(encoding="utf-8"))
        parts = {n: Part(p["library"], p["class"], p["config"]) for n, p in content["parts"].items()}
        return Blueprint(content["pipeline"], parts)
    if (folder / INDEX).is_file():
        return _of_folder(folder)
    known = ", ".join(sorted(file.stem.replace("+", "/") for file in SHIPPED.glob("*.json")))
    raise UsageError(
        f"--random-init has no configuration of model '{preset.name}' ({preset.source}); use a local folder, or {known}"
    )


def known_parts(preset: ModelPreset) -> Mapping[str, Part] | None:
    """The parts of the preset's pipeline, where this machine has their configurations; nothing is downloaded."""
    try:
        return blueprint(preset).parts
    except (UsageError, ValueError, KeyError, IndexError, TypeError):  # its loader says what is wrong
        return None


def _of_folder(folder: Path) -> Blueprint:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    parts = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        files = (folder / name / file for file in ("scheduler_config.json", "config.json"))
        found = next((file for file in files if file.is_file()), None)
        config = json.loads(found.read_text(encoding="utf-8")) if found else {}
        parts[name] = Part(entry[0], entry[1], {k: v for k, v in config.items() if k[0] != "_"}, folder / name)
    return Blueprint(index["_class_name"], parts)


def random_pipeline(preset: ModelPreset, device: torch.device, parts: str = "all") -> Any:
    """The preset's pipeline with weights drawn from a fixed seed, on the device where they are drawn.

    parts: "all", or "text" for the text encoders alone and "rest" for everything but them. In float32 on a CPU and else
    in the preset's dtype. Raises UsageError for a model whose configuration is unknown.
    """
    dtype = getattr(torch, preset.cpu_dtype if device.type == "cpu" else preset.dtype)
    devices = [device.index or 0] if device.type == "cuda" else []

    def within() -> AbstractContextManager[object]:
        torch.manual_seed(0)  # for each network anew, so that it does not depend on which others are made
        return torch.device(device)

    with torch.random.fork_rng(devices):
        pipeline = assemble(preset, dtype, within, UNWANTED[parts])
    if pipeline.vae is not None:
        pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def assemble(
    preset: ModelPreset, dtype: torch.dtype, within: Within = nullcontext, unwanted: tuple[str, ...] = ()
) -> Any:
    """The pipeline without parts whose names begin as `unwanted`; its networks are made within a context, as a device.

    Raises UsageError as `blueprint` does.
    """
    import diffusers
    from diffusers.utils import logging

    from flowbench.models.families import family_class

    logging.set_verbosity_error()
    plan, left_out = blueprint(preset), family_class(preset.family).left_out(preset)
    kind = getattr(diffusers, plan.pipeline)
    parts: dict[str, Any] = dict.fromkeys(kind._get_signature_keys(kind)[0])
    if not plan.has_tokenizers:
        unwanted = (*unwanted, "text_encoder")
    for name, part in plan.parts.items():
        if name in left_out or name.startswith(unwanted):
            continue
        if name in parts:
            parts[name] = network(part, dtype, within) if part.is_network else part.make()
    pipeline = kind(**parts)
    if not plan.has_tokenizers:
        width = plan.parts["transformer"].config
        pipeline.encode_prompt = RandomText(width["joint_attention_dim"], width["pooled_projection_dim"], dtype)
    return pipeline


def network(part: Part, dtype: torch.dtype, within: Within = nullcontext) -> torch.nn.Module:
    """A part that has weights, frozen."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # never in float32 first: that would take twice the memory
    try:
        with within():
            made: torch.nn.Module = part.make().to(dtype).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return made


class RandomText:
    """Stands in for Stable Diffusion 3's `encode_prompt`: normal embeddings that depend on the text alone."""

    def __init__(self, width: int, pooled: int, dtype: torch.dtype) -> None:
        self.width, self.pooled, self.dtype = width, pooled, dtype

    def __call__(
        self,
        prompt: str | list[str],
        *_: object,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        negative_prompt: str | list[str] | None = None,
        max_sequence_length: int = 256,
        **__: object,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """tokens (B, 77 + L, D), those of the negative prompt, and the pooled embeddings (B, D') of both."""
        texts = [prompt] if isinstance(prompt, str) else prompt
        texts = [text for text in texts for _ in range(num_images_per_prompt)]
        negative = [negative_prompt or ""] * len(texts) if isinstance(negative_prompt, str | None) else negative_prompt
        shapes = ((77 + max_sequence_length, self.width), (self.pooled,))
        encoded = [torch.stack([self._drawn(t, shape) for t in part]) for shape in shapes for part in (texts, negative)]
        tokens, no_tokens, pooled, no_pooled = (e.to(device=device, dtype=self.dtype) for e in encoded)
        return tokens, no_tokens, pooled, no_pooled

    def _drawn(self, text: str, shape: tuple[int, ...]) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        return TEXT_SCALE * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
