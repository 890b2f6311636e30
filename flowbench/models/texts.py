"""Prompts as conditioning: each text is encoded once and kept."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence

import torch

from flowbench.models.encoding import ENCODED_AT_A_TIME, EncodedTexts, encode_ahead
from flowbench.models.families.base import Family, NamedTensors
from flowbench.rollout import Conditioning

logger = logging.getLogger("flowbench")


class TextCache:
    """The encodings of every text that was asked for; padding is not kept.

    Beside a GPU they are kept in the host's memory, and only those asked for are copied: T5's tokens of a few hundred
    prompts are about a gigabyte.
    """

    def __init__(self, family: Family, device: torch.device) -> None:
        self.family, self.device = family, device
        self.encoder_device, self.memory = device, torch.device("cpu") if device.type == "cuda" else device
        self._ahead = False
        self._place: dict[str, int] = {}
        self._kept: list[NamedTensors] = []
        self._negative: NamedTensors | None = None
        self._seen: set[str] = set()
        self.cut: set[str] = set()  # texts of which the end is not read

    def announce(self, texts: Iterable[str]) -> None:
        """Take note of texts that will be asked for: how many are longer than is read is said once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._seen]
        self._seen.update(new)
        cut = [text for text in new if self.family.cuts(text)]
        if cut and not self.cut:
            count, ends = (
                (f"{len(cut)} prompts are", "their ends are") if len(cut) > 1 else ("a prompt is", "its end is")
            )
            logger.warning(
                "%s longer than the %d tokens that the text encoder reads, and %s cut, such as %r",
                *(count, self.family.token_limit, ends, cut[0]),
            )
        self.cut.update(cut)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of these prompts, with one embedding per different text."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._place]
        self.announce(new)
        for start in range(0, len(new), ENCODED_AT_A_TIME):
            part = new[start : start + ENCODED_AT_A_TIME]
            for text, encoded in zip(part, self._encode(part), strict=True):
                self._keep(text, encoded)
        ids = [self._place[p] for p in prompts]
        unique = list(dict.fromkeys(ids))
        where = {k: i for i, k in enumerate(unique)}
        index = torch.tensor([where[k] for k in ids], device=self.device)
        return Conditioning(_moved(stack([self._kept[k] for k in unique]), self.device), index)

    @torch.no_grad()
    def negative(self, n: int) -> Conditioning:
        """Conditioning of n rows with what classifier-free guidance leads away from."""
        if self._negative is None:
            encoded = None if self._ahead else self.family.encode_negative(self.encoder_device)
            if encoded is None:
                return self.encode([""] * n)
            self._negative = _moved(encoded, self.device)
        return Conditioning(stack([self._negative]), torch.zeros(n, dtype=torch.int64, device=self.device))

    def release_encoders(self) -> None:
        """Move the text encoders off the device; a text that was not encoded before is then encoded on the CPU."""
        if self.family.classifier_free and self.family.text_encoders:
            self.negative(1)
        self.encoder_device = torch.device("cpu")
        self.family.place_text_encoders(self.encoder_device)

    def take(self, encoded: EncodedTexts) -> None:
        """Keep what was encoded before the rest of the model was loaded; the model has no text encoders then.

        They are loaded again, on the CPU, for a text that is not among them.
        """
        self._ahead = True
        for text, tensors in encoded.texts.items():
            if text not in self._place:
                self._keep(text, tensors)
        if encoded.negative is not None:
            self._negative = _moved(encoded.negative, self.device)

    def branch(self) -> TextCache:
        """A cache that has what this one has; what either encodes from here on, the other does not see."""
        other = copy.copy(self)
        other._place, other._kept = dict(self._place), list(self._kept)
        return other

    def _encode(self, texts: list[str]) -> list[NamedTensors]:
        if not self._ahead:
            return self.family.encode(texts, self.encoder_device)
        logger.warning("the text encoders are loaded again for a prompt that was not announced: %r", texts[0])
        found = encode_ahead(self.family.preset, self.device, [texts], on=torch.device("cpu")).texts
        return [found[text] for text in texts]

    def _keep(self, text: str, encoded: NamedTensors) -> None:
        self._place[text] = len(self._kept)
        self._kept.append(_moved(encoded, self.memory))


def _moved(encoded: NamedTensors, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: t.to(device) for name, t in encoded.items()}


def stack(entries: Sequence[NamedTensors]) -> dict[str, torch.Tensor]:
    """Named tensors of P texts as tensors (P, ...); shorter ones are padded at the end with zeros, masks with False."""
    return {
        name: torch.nn.utils.rnn.pad_sequence([entry[name] for entry in entries], batch_first=True)
        for name in entries[0]
    }
