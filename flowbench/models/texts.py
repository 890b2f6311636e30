"""Prompts as conditioning: each text is encoded once and kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flowbench.models.families.base import Family, NamedTensors
from flowbench.rollout import Conditioning

ENCODED_AT_A_TIME = 32


class TextCache:
    """The encodings of every text that was asked for, on the policy's device; padding is not kept."""

    def __init__(self, family: Family, device: torch.device) -> None:
        self.family, self.device = family, device
        self.encoder_device = device
        self._place: dict[str, int] = {}
        self._kept: list[NamedTensors] = []
        self._negative: NamedTensors | None = None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of these prompts, with one embedding per different text."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._place]
        for start in range(0, len(new), ENCODED_AT_A_TIME):
            part = new[start : start + ENCODED_AT_A_TIME]
            for text, encoded in zip(part, self.family.encode(part, self.encoder_device), strict=True):
                self._place[text] = len(self._kept)
                self._kept.append(self._moved(encoded))
        ids = [self._place[p] for p in prompts]
        unique = list(dict.fromkeys(ids))
        where = {k: i for i, k in enumerate(unique)}
        index = torch.tensor([where[k] for k in ids], device=self.device)
        return Conditioning(stack([self._kept[k] for k in unique]), index)

    @torch.no_grad()
    def negative(self, n: int) -> Conditioning:
        """Conditioning of n rows with what classifier-free guidance leads away from."""
        if self._negative is None:
            encoded = self.family.encode_negative(self.encoder_device)
            if encoded is None:
                return self.encode([""] * n)
            self._negative = self._moved(encoded)
        return Conditioning(stack([self._negative]), torch.zeros(n, dtype=torch.int64, device=self.device))

    def release_encoders(self) -> None:
        """Move the text encoders off the device; a text that was not encoded before is then encoded on the CPU."""
        if self.family.classifier_free and self.family.text_encoders:
            self.negative(1)
        self.encoder_device = torch.device("cpu")
        self.family.release_text_encoders()

    def _moved(self, encoded: NamedTensors) -> NamedTensors:
        return {name: t.to(self.device) for name, t in encoded.items()}


def stack(entries: Sequence[NamedTensors]) -> dict[str, torch.Tensor]:
    """Named tensors of P texts as tensors (P, ...); shorter ones are padded at the end with zeros, masks with False."""
    return {
        name: torch.nn.utils.rnn.pad_sequence([entry[name] for entry in entries], batch_first=True)
        for name in entries[0]
    }
