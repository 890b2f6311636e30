"""Named generators: every consumer of randomness has its own, so that adding one does not shift another."""

from __future__ import annotations

import hashlib

import torch


def seed_for(*names: str | int) -> int:
    """A 63-bit seed from a run's seed and the consumer's name, for example (seed, "rollout", iteration)."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(*names: str | int) -> torch.Generator:
    """A CPU generator seeded by `seed_for`."""
    return torch.Generator().manual_seed(seed_for(*names))
