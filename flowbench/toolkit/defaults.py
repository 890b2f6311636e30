"""Settings that algorithms of several kinds share, so that none is written twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HAND_SEARCH = "docs/mini-sd3-search.md"  # by hand and uneven: one to 170 runs an algorithm
MINI_SD3_LORA: Mapping[str, Any] = {"tuning": "lora", "lora_rank": 8, "lora_alpha": 16}
