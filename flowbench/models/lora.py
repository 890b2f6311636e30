"""LoRA adapters of a diffusers module: adding, finding, switching and saving them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

TRAINED = "default"


def add_adapter(module: Any, name: str, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Add an adapter on the layers whose names end as `targets`, in float32; only TRAINED is trainable.

    The module then computes with the new adapter.
    """
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
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


def adapted_layers(module: torch.nn.Module) -> list[Any]:
    """The layers that have adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def switch_adapter(layers: Sequence[Any], name: str | None) -> None:
    """Let these layers compute with this adapter, or with none."""
    for layer in layers:
        if name is None:
            layer.enable_adapters(False)
        else:
            layer.set_adapter(name, inference_mode=True)
            if layer.disable_adapters:
                layer.enable_adapters(True)


def save_adapter(pipeline: Any, folder: Path) -> None:
    """Write the trained adapter in diffusers' own format."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(pipeline.transformer, adapter_name=TRAINED)
    metadata = _collate_lora_metadata({"transformer": pipeline.transformer})
    pipeline.save_lora_weights(folder, transformer_lora_layers=layers, **metadata)
