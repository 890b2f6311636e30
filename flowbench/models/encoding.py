"""Prompts are encoded before the rest of a model is loaded, so that text encoders and transformer never meet in memory.

What they are encoded to is kept on disk, so that a later run loads no text encoder at all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from flowbench.caches import Cache
from flowbench.hooks import is_out_of_memory
from flowbench.models.devices import device_identity
from flowbench.models.families import family_class, load_pipeline
from flowbench.models.families.base import Family, NamedTensors
from flowbench.models.memory import release_memory
from flowbench.models.presets import ModelPreset
from flowbench.models.sources import source_identity

ENCODED_AT_A_TIME = 32
FILES = ("text_encoder", "tokenizer")  # beginnings of the names of folders that decide an encoding
# Of a preset, what no encoding depends on; the source is known by its files.
UNREAD = (
    *("name", "source", "licence", "resolution", "num_steps", "guidance_scale", "sigma_spacing"),
    *("prompts", "rewards", "training", "evaluation", "like", "algorithms"),
)
PACKAGES = ("diffusers", "transformers", "tokenizers")  # that decide an encoding, beside torch

logger = logging.getLogger("flowbench")


@dataclass(frozen=True)
class EncodedTexts:
    """Named tensors of texts, on the host. negative: what guidance leads away from, None if that is the text ""."""

    texts: Mapping[str, NamedTensors]
    negative: NamedTensors | None = None


def encodes_ahead(preset: ModelPreset, device: torch.device, asked: bool | None = None) -> bool:
    """Whether a model's prompts are encoded before the rest of it is loaded: where asked for, or by default on a GPU.

    On a CPU the models are small, and their text encoders are loaded in less time than a cache is read. Random weights
    are not kept, and need no encoders.
    """
    has_encoders = not preset.random_init and bool(family_class(preset.family).text_encoders)
    return has_encoders and (device.type == "cuda" if asked is None else asked)


def encode_ahead(
    preset: ModelPreset, device: torch.device, groups: Sequence[Sequence[str]], on: torch.device | None = None
) -> EncodedTexts:
    """Encodings of groups of texts, and of the negative prompt: from the cache, or by text encoders that then go.

    The bits of an encoding can depend on the texts beside it, so each group is encoded, and kept, as a whole, without
    the texts of groups before it; these are the encodings of a `TextCache` that is asked for one group after another.
    device: of the model, which decides the precision; on: where the
    encoders run, by default there. Encoders that do not fit on it together take turns.
    Raises UsageError and RunError as `load_pipeline` does.
    """
    on = on or device
    kind = family_class(preset.family)
    jobs = [_Job(group) for group in _new(groups)]
    if kind.encode_negative is not Family.encode_negative:
        jobs.append(_Job(("",), negative=True))
    cache = Cache("texts")
    source = source_identity(preset, FILES)
    found = {job: _read(cache, job.identity(preset, source, on)) for job in jobs} if source else {}
    missing = [job for job in jobs if found.get(job) is None]
    if missing:
        made = _encode(preset, device, on, missing)
        release_memory()
        source = source_identity(preset, FILES)  # what was not on this machine was fetched by loading it
        for job, encoded in made.items():
            found[job] = encoded
            if source:
                cache.write(job.identity(preset, source, on), _flat(encoded))
    texts: dict[str, NamedTensors] = {}
    negative = None
    for job in jobs:
        encoded = found[job] or []
        if job.negative:
            (negative,) = encoded
        else:
            texts |= zip(job.texts, encoded, strict=True)
    return EncodedTexts(texts, negative)


def _new(groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, ...]]:
    """The texts of each group that are in none before it, each once, without empty groups."""
    seen: set[str] = set()
    for group in groups:
        if new := tuple(text for text in dict.fromkeys(group) if text not in seen):
            yield new
        seen.update(new)


@dataclass(frozen=True)
class _Job:
    """Texts that are encoded together, each once."""

    texts: tuple[str, ...]
    negative: bool = False

    def identity(self, preset: ModelPreset, source: str, device: torch.device) -> str:
        """All that decides the encodings to the last bit."""
        content: dict[str, Any] = {
            "texts": self.texts,
            "negative": self.negative,
            "at a time": ENCODED_AT_A_TIME,
            "source": source,
            "preset": preset.model_dump(mode="json", exclude=set(UNREAD)),
            "device": device_identity(device),
            "packages": {name: version(name) for name in PACKAGES},
        }
        return json.dumps(content, sort_keys=True)

    def run(self, family: Family, device: torch.device) -> list[NamedTensors]:
        """The encodings, on the host."""
        if self.negative:
            encoded = family.encode_negative(device)
            assert encoded is not None
            return [_on_host(encoded)]
        parts = (self.texts[k : k + ENCODED_AT_A_TIME] for k in range(0, len(self.texts), ENCODED_AT_A_TIME))
        return [_on_host(encoded) for part in parts for encoded in family.encode(list(part), device)]


@torch.no_grad()
def _encode(
    preset: ModelPreset, device: torch.device, on: torch.device, jobs: Sequence[_Job]
) -> dict[_Job, list[NamedTensors]]:
    """Load the text encoders alone, encode, and free them."""
    family = family_class(preset.family)(load_pipeline(preset, device, "text"), preset)
    for encoder in family.modules():
        encoder.requires_grad_(False).eval()
    try:
        family.place_text_encoders(on)
        return {job: job.run(family, on) for job in jobs}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    logger.warning("out of memory: the text encoders do not fit on %s together; they take turns", on)
    family.place_text_encoders(torch.device("cpu"))
    release_memory()
    family.pipeline.enable_model_cpu_offload(device=on)
    return {job: job.run(family, on) for job in jobs}


def _on_host(encoded: NamedTensors) -> dict[str, torch.Tensor]:
    return {name: t.cpu() for name, t in encoded.items()}


def _flat(encoded: Sequence[NamedTensors]) -> dict[str, torch.Tensor]:
    return {f"{k}.{name}": t for k, tensors in enumerate(encoded) for name, t in tensors.items()}


def _read(cache: Cache, identity: str) -> list[NamedTensors] | None:
    """What `_flat` was given."""
    flat = cache.read(identity)
    if flat is None:
        return None
    nested: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in flat.items():
        number, name = key.split(".", 1)
        nested.setdefault(int(number), {})[name] = value
    return [nested[k] for k in range(len(nested))]
