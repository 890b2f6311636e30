"""What a search is made on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from flowbench.models.presets import load_preset
from flowbench.terms import path_name


class SearchWorkload(BaseModel):
    """Model, reward trained on and budget of a search. images: None is the model's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    model: str
    reward: str
    images: int | None = None
    hash: str

    @property
    def settings(self) -> dict[str, Any]:
        """What it says of a run, as overrides of `resolve_config`."""
        return {} if self.images is None else {"training.images": self.images}


def search_workload(model: str, reward: str, images: int | None = None) -> SearchWorkload:
    """The workload that these make; its hash is over its content.

    The one place where a search gets its workload: a named one takes this one's place here.
    Raises UsageError for an unknown model.
    """
    name = f"{load_preset(model).name}-{path_name(reward)}"
    content: Mapping[str, Any] = {"model": model, "reward": reward, "images": images}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
    return SearchWorkload(name=name, model=model, reward=reward, images=images, hash=digest)
