"""Reward models of transformers with their real configuration and random weights; see `checkpoints.random_weights`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowbench.errors import RunError
from flowbench.models.presets import resolve_weights

_VIT_H: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
}
CONFIGURATIONS = {"yuvalkirstain/PickScore_v1": _VIT_H}  # hub id to config.json, where it differs from the defaults


def random_pretrained(reward: str, kind: Any, source: str) -> Any:
    """A transformers model, frozen, or a stand-in for its tokenizer.

    Raises RunError for a model whose configuration is neither in a local folder nor known.
    """
    place = Path(resolve_weights(source))
    if kind.__name__ == "AutoTokenizer":
        return kind.from_pretrained(place) if place.is_dir() else Bytes()
    if (place / "config.json").is_file() and hasattr(kind, "config_class"):
        config = kind.config_class.from_pretrained(place)
    elif source in CONFIGURATIONS:
        config = kind.config_class(**CONFIGURATIONS[source])
    else:
        raise RunError(
            f"reward '{reward}' cannot be built at random: the configuration of '{source}' is unknown; "
            "leave it out of --reward and evaluation.judges"
        )
    return kind(config).eval().requires_grad_(False)


class Encoded(dict[str, torch.Tensor]):
    """What a tokenizer returns."""

    @property
    def input_ids(self) -> torch.Tensor:
        """(B, L) int64."""
        return self["input_ids"]

    @property
    def attention_mask(self) -> torch.Tensor:
        """(B, L), 0 for padding."""
        return self["attention_mask"]

    def to(self, device: torch.device) -> Encoded:
        """The same on a device."""
        return Encoded({name: tensor.to(device) for name, tensor in self.items()})


class Bytes:
    """A tokenizer without a file: a text's bytes, of the longest length that the model takes."""

    def add_special_tokens(self, tokens: Mapping[str, object]) -> int:
        """Bytes need none."""
        return 0

    def __call__(self, texts: Sequence[str], max_length: int = 77, **_: object) -> Encoded:
        """Texts as input_ids (B, max_length) and attention_mask."""
        ids, mask = (torch.zeros(len(texts), max_length, dtype=torch.int64) for _ in range(2))
        for row, text in enumerate(texts):
            content = torch.tensor([2 + byte for byte in text.encode()][:max_length])
            ids[row, : len(content)], mask[row, : len(content)] = content, 1
        return Encoded(input_ids=ids, attention_mask=mask)
