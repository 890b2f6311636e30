"""Families of pipelines, one file each; this registry names them without importing torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowbench.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

    from flowbench.models.families.base import Family, Parts
    from flowbench.models.presets import ModelPreset


@dataclass(frozen=True)
class FamilyEntry:
    """Where a family's class is, and how a model of it is sampled when no preset says.

    module and cls: its file and class; pipelines: the diffusers classes that it serves, as model_index.json names them;
    num_steps, guidance_scale, max_sequence_length: the defaults of that pipeline's own call; a scale of 1 is none;
    guided_evaluations: function evaluations of one step with guidance.
    """

    module: str
    cls: str
    pipelines: tuple[str, ...] = ()
    num_steps: int = 28
    guidance_scale: float = 1.0
    max_sequence_length: int = 256
    guided_evaluations: int = 2


FAMILIES: dict[str, FamilyEntry] = {
    "sd3": FamilyEntry("sd3", "StableDiffusion3", ("StableDiffusion3Pipeline",), guidance_scale=7.0),
    "flux": FamilyEntry(
        "flux", "Flux", ("FluxPipeline",), guidance_scale=3.5, max_sequence_length=512, guided_evaluations=1
    ),
    "lumina2": FamilyEntry(
        "lumina2", "Lumina2", ("Lumina2Pipeline", "Lumina2Text2ImgPipeline"), num_steps=30, guidance_scale=4.0
    ),
    "zimage": FamilyEntry(
        "zimage", "ZImage", ("ZImagePipeline",), num_steps=50, guidance_scale=6.0, max_sequence_length=512
    ),
    "plane": FamilyEntry("plane", "Plane"),
}


def family_entry(name: str) -> FamilyEntry:
    """The registry's line of a family.

    Raises UsageError for an unknown one.
    """
    if name not in FAMILIES:
        raise UsageError(f"unknown family '{name}'{did_you_mean(name, FAMILIES)}")
    return FAMILIES[name]


def family_class(name: str) -> type[Family]:
    """The class of a family.

    Raises UsageError for an unknown one.
    """
    entry = family_entry(name)
    found: type[Family] = getattr(importlib.import_module(f"{__name__}.{entry.module}"), entry.cls)
    return found


def family_of(pipeline: str) -> str | None:
    """The family that serves a diffusers class ("FluxPipeline"); None if there is none."""
    return next((name for name, entry in FAMILIES.items() if pipeline in entry.pipelines), None)


def served_pipelines() -> list[str]:
    """The diffusers classes that some family serves."""
    return [pipeline for entry in FAMILIES.values() for pipeline in entry.pipelines]


def load_pipeline(preset: ModelPreset, device: torch.device, parts: Parts = "all") -> Any:
    """The preset's pipeline from its folder or hub id, in the preset's `dtype`, or on a CPU in its `cpu_dtype`.

    parts: "text" is the text encoders alone, "rest" everything but them.

    Raises UsageError for a pipeline of another family, RunError when its weights cannot be found or read.
    """
    if preset.random_init:
        from flowbench.models.families.random_init import random_pipeline

        return random_pipeline(preset, device, parts)
    return family_class(preset.family).load(preset, device, parts)
