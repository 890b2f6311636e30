"""LoRA adapters as weight views of one module: "default" is trained, others are copies of it, none is the reference."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

TARGETS = [
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
]
TRAINED = "default"


def add_adapter(module: Any, name: str, rank: int, alpha: float) -> None:
    """Add an adapter on the attention projections, in float32, and make it active; only TRAINED is trainable."""
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights="gaussian")
    with warnings.catch_warnings():
        # peft warns of any second adapter on a module, which is what a view is.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute", category=UserWarning)
        module.add_adapter(config, adapter_name=name)
    for p in adapter_parameters(module, name):
        p.data = p.data.float()
        p.requires_grad_(name == TRAINED)


def adapter_parameters(module: torch.nn.Module, name: str) -> list[torch.nn.Parameter]:
    """The weights of an adapter, in a fixed order; none if there is no such adapter."""
    return [p for n, p in module.named_parameters() if "lora_" in n and f".{name}." in n]


def save_adapter(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """Write the trained adapter in diffusers' own format."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(pipeline.transformer, adapter_name=TRAINED)
    metadata = _collate_lora_metadata({"transformer": pipeline.transformer})
    pipeline.save_lora_weights(folder, transformer_lora_layers=layers, **metadata)


class AdapterState:
    """Within it, the module computes with another adapter, or with none for "reference"."""

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name = module, name

    def __enter__(self) -> torch.nn.Module:
        if self.name == "reference":
            self.module.disable_adapters()
        else:
            self.module.set_adapter(self.name)
        module: torch.nn.Module = self.module
        return module

    def __exit__(self, *_: object) -> None:
        if self.name == "reference":
            self.module.enable_adapters()
        self.module.set_adapter(TRAINED)
        for p in adapter_parameters(self.module, TRAINED):
            p.requires_grad_(True)
