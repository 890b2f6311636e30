"""LoRA files of other origin: diffusers' own form, peft's with adapter_config.json, those with alphas as tensors."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from flowbench.errors import RunError
from flowbench.models.loading import brief
from flowbench.reading.tensors import TensorError, check_keys, read_metadata, read_tensors

LORA = "pytorch_lora_weights.safetensors"  # diffusers' own name
PEFT, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX, PREFIX = "base_model.model.", "transformer."
METADATA = "lora_adapter_metadata"  # where diffusers keeps a LoRA's settings in the file itself
TEXT = ("text_encoder", "lora_te")
OLD_NAMES = {".lora.down.": ".lora_A.", ".lora.up.": ".lora_B.", ".lora_down.": ".lora_A.", ".lora_up.": ".lora_B."}
_WEIGHT = re.compile(r"(.+)\.lora_([AB])\.weight")

logger = logging.getLogger("flowbench")


@dataclass(frozen=True)
class Lora:
    """A LoRA of a transformer. tensors: by peft's names, "blocks.0.to_q.lora_A.weight"; settings: of peft's LoraConfig.

    has_alpha: whether the file says its alpha, and so its strength; declared: whether the settings are its own.
    """

    tensors: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any]
    has_alpha: bool
    declared: bool


def lora_file(path: Path) -> Path | None:
    """The file of a LoRA: `path` itself, or the one in that folder; None if there is none."""
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    return next((path / name for name in (LORA, PEFT) if (path / name).is_file()), None)


def load_lora(pipeline: Any, file: Path, model: str) -> None:
    """Let a pipeline's transformer compute with a LoRA, of which every tensor is accounted for.

    A LoRA without an alpha has the strength 1, as diffusers has it, and that is said.
    Raises RunError, naming file and model, for tensors that are missing, unknown, of another shape or kind, not finite,
    or of the text encoders, and for settings that are not plain LoRA.
    """
    try:
        lora = read_lora(file, type(pipeline))
        _inject(pipeline.transformer, lora)
    except TensorError as error:
        raise RunError(f"LoRA '{file}' does not fit model '{model}': it {error}") from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise RunError(f"LoRA '{file}' does not fit model '{model}': {brief(error)}") from error
    if not lora.has_alpha:
        logger.warning(
            "LoRA '%s' does not say its alpha; its rank is taken, as diffusers does, which is strength 1", file
        )


def read_lora(file: Path, pipeline: Any) -> Lora:
    """Read a LoRA's file. pipeline: the class that converts foreign names.

    Raises TensorError for what is no LoRA of a transformer, RunError for parts that cannot be scored.
    """
    tensors = read_tensors(file)
    foreign = sorted(name for name in tensors if name.startswith(TEXT))
    if foreign:
        raise RunError(f"LoRA '{file}' also changes the text encoders ({foreign[0]}); only the transformer is scored")
    if not tensors:
        raise TensorError("has no weights")
    if all(name.startswith(PEFT_PREFIX) for name in tensors):
        named = {name.removeprefix(PEFT_PREFIX): value for name, value in tensors.items()}
        return _paired(named, _peft_settings(file.with_name(PEFT_CONFIG)))
    alphas: Mapping[str, Any] = {}
    if not any(name.startswith(PREFIX) for name in tensors):  # another program's names
        converted = pipeline.lora_state_dict(dict(tensors))
        tensors, *more = converted if isinstance(converted, tuple) else (converted,)
        alphas = next((found for found in more if isinstance(found, dict)), {})
    text = read_metadata(file).get(METADATA)
    settings = json.loads(text) if text else None
    if settings is not None:
        settings = {k.removeprefix(PREFIX): v for k, v in settings.items() if k.startswith(PREFIX)}
    named = {_new_name(name.removeprefix(PREFIX)): value for name, value in (tensors | dict(alphas)).items()}
    return _paired(named, settings)


def _new_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _peft_settings(config: Path) -> dict[str, Any]:
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TensorError(f"has peft's names, and there is no {config.name} beside it that says its alpha") from error
    except (OSError, ValueError) as error:
        raise TensorError(f"has a {config.name} that cannot be read: {brief(error)}") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise TensorError(f"has a {config.name} of another kind than LORA")
    for name, plain in (("use_dora", (False, None)), ("modules_to_save", (None, [])), ("bias", ("none", None))):
        if content.get(name) not in plain:
            raise TensorError(f"has '{name}': {json.dumps(content[name])} in its {config.name}; plain LoRA is scored")
    return content


def _paired(named: Mapping[str, Any], settings: Mapping[str, Any] | None) -> Lora:
    """A LoRA of tensors by peft's names, of which each has its partner, and of alphas, "blocks.0.to_q.alpha"."""
    alphas = {name.removesuffix(".alpha"): float(value) for name, value in named.items() if name.endswith(".alpha")}
    tensors = {name: value for name, value in named.items() if not name.endswith(".alpha")}
    found: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for name, value in tensors.items():
        if match := _WEIGHT.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = value
        else:
            unknown.append(name)
    partners = [f"{layer}.lora_{side}.weight" for layer, sides in found.items() for side in "AB" if side not in sides]
    check_keys(partners, [*unknown, *(f"{layer}.alpha" for layer in alphas if layer not in found)])
    for layer, sides in found.items():
        if sides["A"].ndim < 2 or sides["B"].ndim < 2 or sides["A"].shape[0] != sides["B"].shape[1]:
            shapes = f"{tuple(sides['A'].shape)} and {tuple(sides['B'].shape)}"
            raise TensorError(f"has weights of '{layer}' whose shapes do not fit each other, {shapes}")
    if settings is not None:
        return Lora(tensors, settings, has_alpha=True, declared=True)
    ranks = {layer: sides["A"].shape[0] for layer, sides in found.items()}
    strengths = {layer: alphas.get(layer, float(rank)) for layer, rank in ranks.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(strengths.values()).most_common(1)[0][0]
    own: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(layer)}": r for layer, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(layer)}": a for layer, a in strengths.items() if a != alpha},
        "target_modules": sorted(ranks),
    }
    return Lora(tensors, own, has_alpha=bool(alphas), declared=False)


def _inject(transformer: Any, lora: Lora) -> None:
    """Add the LoRA to a transformer, and see that all of it, and nothing else, has arrived there."""
    from diffusers.utils import get_adapter_name
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    known = {one.name for one in fields(LoraConfig)}
    settings = {name: value for name, value in lora.settings.items() if name in known}
    config, layers = LoraConfig(**settings), dict(transformer.named_modules())
    given = {name.rpartition(".lora_")[0] for name in lora.tensors}
    # Of the layers that the settings name, peft would adapt those alone that the file has.
    linear = (n for n, m in layers.items() if isinstance(m, torch.nn.Linear))
    wanted = {n for n in linear if check_target_module_exists(config, n)} if lora.declared else set()
    check_keys((f"{n}.lora_A.weight" for n in wanted - given), given - layers.keys())
    for key, value in lora.tensors.items():
        layer = layers[key.rpartition(".lora_")[0]]
        if isinstance(layer, torch.nn.Linear):
            wide = layer.in_features if ".lora_A." in key else layer.out_features
            if value.ndim != 2 or value.shape[1 if ".lora_A." in key else 0] != wide:
                raise TensorError(f"has weight '{key}' of shape {tuple(value.shape)}; the layer is {wide} wide there")
    name = get_adapter_name(transformer)
    level = logging.getLogger("diffusers").level
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)  # it says again what it raises
    try:
        transformer.load_lora_adapter(dict(lora.tensors), prefix=None, metadata=settings, adapter_name=name)
    finally:
        logging.getLogger("diffusers").setLevel(level)
    own = {n.replace(f".{name}.", "."): p for n, p in transformer.named_parameters() if f".{name}." in n}
    check_keys(own.keys() - lora.tensors.keys(), lora.tensors.keys() - own.keys())
    for key, value in lora.tensors.items():
        if own[key].shape != value.shape:
            raise TensorError(
                f"has weight '{key}' of shape {tuple(value.shape)}; the model's is {tuple(own[key].shape)}"
            )
        if not torch.equal(own[key].detach().cpu(), value.to(own[key].dtype)):
            raise TensorError(f"has weight '{key}', which the model did not take")
