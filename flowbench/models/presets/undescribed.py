"""Models that no preset describes: a pipeline's folder or hub id, with what its own files say and usual settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from flowbench.errors import UsageError
from flowbench.models.families import FAMILIES, family_of, served_pipelines

INDEX = "model_index.json"
STEPS_IN_TRAINING = 10  # as in Flow-GRPO (2505.05470)
STEPS_OF_DISTILLED = 8  # of models that need no guidance: FLUX.1-schnell, SD3.5-large-turbo, Z-Image-Turbo
# The settings of the SD3 presets that do not depend on the model; see sd3.5-medium.yaml for their source.
TRAINING: dict[str, Any] = {
    "tuning": "lora",
    "lora_rank": 32,
    "lora_alpha": 64.0,
    "learning_rate": 3.0e-4,
    "adam_betas": [0.9, 0.999],
    "weight_decay": 1.0e-4,
    "microbatch": 8,
    "gradient_checkpointing": True,
}


def is_hub_id(name: str) -> bool:
    """Whether the name has the form of a hub id, owner/model."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def find_pipeline(name: str, source: str) -> Path | None:
    """The local folder with model_index.json: `source` itself, or of a hub id in the hub's cache; None without one."""
    if (Path(source) / INDEX).is_file():
        return Path(source)
    if not is_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, INDEX)
    return Path(cached).parent if isinstance(cached, str) else None


def described(name: str, folder: Path) -> dict[str, Any]:
    """The content of a preset for the pipeline in `folder`, which was asked for by `name`, a path or hub id.

    Raises UsageError for a pipeline that no family serves, or a model_index.json that cannot be read.
    """
    index = _read(folder / INDEX)
    named = str(index.get("_class_name"))
    family = family_of(named)
    if family is None:
        served = ", ".join(served_pipelines())
        raise UsageError(f"model '{name}' is a {named}, which no family of flowbench serves; there are: {served}")
    entry = FAMILIES[family]
    transformer, vae = (_read(folder / part / "config.json") for part in ("transformer", "vae"))
    short = Path(name).resolve().name
    guided = transformer.get("guidance_embeds", True) and "turbo" not in short.lower()
    num_steps = entry.num_steps if guided else STEPS_OF_DISTILLED
    return {
        "name": short,
        "source": str(Path(name).resolve()) if Path(name).is_dir() else name,
        "family": family,
        "licence": "unknown",
        "resolution": _resolution(transformer, vae),
        "num_steps": num_steps,
        "guidance_scale": entry.guidance_scale if guided else 1.0,
        "max_sequence_length": entry.max_sequence_length,
        "has_t5": any(part is not None for part in index.get("text_encoder_3", ())),
        "dtype": "bfloat16",
        "prompts": "objects",
        "training": {**TRAINING, "num_steps": min(STEPS_IN_TRAINING, num_steps)},
    }


def _resolution(transformer: dict[str, Any], vae: dict[str, Any]) -> int:
    """Pixels per side: what the transformer says in latents, else what the VAE says."""
    if "sample_size" in transformer:
        return int(transformer["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    return int(vae.get("sample_size", 1024))


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return dict(content)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"'{path}' cannot be read: {str(error).splitlines()[0]}; fetch the model again") from error
