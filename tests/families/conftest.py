"""Each family's tiny pipeline as a real folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline

from flowbench.models.families import load_pipeline
from flowbench.models.policy import Policy, Tuning
from flowbench.models.presets import ModelPreset, load_preset

CPU = torch.device("cpu")
LORA = Tuning("lora", lora_rank=4, lora_alpha=8.0)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name of a kind: the three families, and their variants."""
    root = tmp_path_factory.mktemp("pipelines")
    pipelines = {
        "sd3": tiny_pipelines.sd3(),
        "sd3.5": tiny_pipelines.sd3(dual_layers=(0,), qk_norm=True),
        "sd3.5-large": tiny_pipelines.sd3(qk_norm=True),
        "flux": tiny_pipelines.flux(),
        "schnell": tiny_pipelines.flux(guidance=False),
        "lumina2": tiny_pipelines.lumina2(),
        "zimage": tiny_pipelines.zimage(),
    }
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(root / name)
    return {name: root / name for name in pipelines}


@pytest.fixture(scope="session")
def described(folders: dict[str, Path]) -> Callable[..., ModelPreset]:
    """What flowbench makes of a folder that no preset describes, with short prompts and three steps."""

    def describe(kind: str, **changed: Any) -> ModelPreset:
        short = {"num_steps": 3, "max_sequence_length": 64}
        return load_preset(str(folders[kind])).model_copy(update={**short, **changed})

    return describe


@pytest.fixture
def make(described: Callable[..., ModelPreset]) -> Callable[..., Policy]:
    """A policy of a kind in this precision; further arguments as in `Policy`."""

    def build(
        kind: str,
        tuning: Tuning = LORA,
        guidance_scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
        sigma_spacing: str = "pipeline",
        resolution: int | tuple[int, int] = tiny_pipelines.SIDE,
        **arguments: Any,
    ) -> Policy:
        changed = {"guidance_scale": guidance_scale, "sigma_spacing": sigma_spacing, "resolution": resolution}
        preset = described(kind, **changed)
        torch.manual_seed(2)
        return Policy(load_pipeline(preset, CPU).to(dtype), preset, tuning, **arguments)

    return build


@pytest.fixture(scope="session")
def plain(folders: dict[str, Path]) -> Callable[[str], Any]:
    """The pipeline as diffusers alone loads it."""

    def load(kind: str) -> Any:
        pipeline = DiffusionPipeline.from_pretrained(folders[kind])
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load
