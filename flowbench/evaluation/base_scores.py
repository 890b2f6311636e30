"""The base model's scores, which are the same in all runs of a model and protocol, are kept on disk and used again.

They are used only where everything is the same that decides them: the model's files and preset, the protocol with its
prompts, the judges with their weights, the code, the packages and the kind of device.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch

import flowbench
from flowbench.caches import Cache
from flowbench.config import EvaluationConfig
from flowbench.evaluation.album import Page
from flowbench.evaluation.protocol import (
    Judges,
    Portions,
    Progress,
    SplitScores,
    count_images,
    decode_batch,
    guidance_scales,
    score_split,
)
from flowbench.models.devices import device_identity
from flowbench.models.policy import Policy
from flowbench.models.sources import source_identity
from flowbench.prompts import PromptSplit, spread
from flowbench.record import package_versions
from flowbench.reward import Reward
from flowbench.scoring.visitor import Visitor

# What an evaluation imports, by the rule of rooms; algorithms and training are not among it.
ROOMS = ("evaluation", "models", "prompts", "scoring", "testbeds")
EACH = "each image's "  # before the names of tensors that have a score for each image of the grid
UNREAD = ("name", "source", "licence", "prompts", "rewards", "training", "evaluation", "like", "algorithms")
NO_PART = ("splits", "judges", "base_cache", "judge_precision")  # of the protocol, for one split and its judges


class BaseScores:
    """Scores of the base model of a policy, by split, under a protocol and its judges."""

    def __init__(self, policy: Policy, judges: Judges, config: EvaluationConfig) -> None:
        self.policy, self.judges, self.config = policy, judges, config
        self.cache = Cache("base-scores")
        self._shared = self._identity() if config.base_cache and self.cache.folder else None

    def scores(
        self,
        split: PromptSplit,
        progress: Progress = lambda images: None,
        portions: Portions | None = None,
        page: Page | None = None,
    ) -> tuple[SplitScores, bool]:
        """The base model's scores, and whether they are those that were kept; else they are computed, and kept.

        progress, portions, page: as in `score_split`; for the images' sake they are computed in any case.
        """
        policy, config, portions = self.policy, self.config, portions or Portions(self.policy, self.config)
        found = None if page else self.read(split)
        # All processes read or all compute: one may find what another has just written.
        missing = policy.processes.any(found is None)
        if found is not None and not missing:
            progress(count_images(policy, [split], config))
            return found, True
        computed = score_split(policy, "reference", split, self.judges, config, progress, portions, page)
        if portions.undivided and policy.processes.is_main:
            self.write(split, computed)
        return computed, False

    def read(self, split: PromptSplit) -> SplitScores | None:
        """The scores that are kept; None if there are none of exactly this identity."""
        identity = self._of(split)
        kept = None if identity is None else self.cache.read(identity)
        if kept is None:
            return None
        grid = kept.pop("grid")
        each = {name.removeprefix(EACH): kept[name].numpy() for name in sorted(kept) if name.startswith(EACH)}
        scores = {name: kept[name].numpy() for name in self._order(set(kept))}
        return SplitScores(spread(split, self.config.prompts), scores, grid, each)

    def write(self, split: PromptSplit, scores: SplitScores) -> None:
        """Keep scores, if it is known what decides them."""
        identity = self._of(split)
        if identity is not None:
            tensors = {name: torch.from_numpy(values) for name, values in scores.scores.items()}
            each = {f"{EACH}{name}": torch.from_numpy(values) for name, values in scores.each.items()}
            self.cache.write(identity, {**tensors, **each, "grid": scores.grid})

    def _of(self, split: PromptSplit) -> str | None:
        if self._shared is None:
            return None
        content = {**self._shared, "split": split.name, "prompts": split.sha256}
        return json.dumps(content, sort_keys=True, default=str)

    def _identity(self) -> dict[str, Any] | None:
        """What decides the scores of all splits; None if that cannot be known."""
        policy, config = self.policy, self.config
        source = source_identity(policy.preset)
        known = {name: _judge_identity(reward) for name, reward in self.judges.rewards.items()}
        if source is None or None in known.values():
            return None
        protocol = config.model_dump(mode="json", exclude={*NO_PART, *config.observes})
        return {
            "source": source,
            "preset": policy.preset.model_dump(mode="json", exclude=set(UNREAD)),
            "processes": policy.processes.count,  # which divide the batches
            "tuning": policy.tuning.kind,
            "compiled": policy.compiled,
            "dtype": str(policy.model_dtype),
            "protocol": {**protocol, "decode_batch": decode_batch(policy, config)},
            "judges": known,
            "oracle": self.judges.oracle,
            "device": device_identity(policy.device),
            "packages": package_versions(),
            "code": code_hash(),
        }

    def _order(self, names: set[str]) -> list[str]:
        """As `score_split` has them: the judges' names in their order, then the others; by guidance."""
        endings = guidance_scales(self.policy, self.config)
        plain = [*self.judges.rewards, "oracle_exact", "oracle_soft", "w2", "diversity"]
        return [f"{name}{ending}" for ending in endings for name in plain if f"{name}{ending}" in names]


def _judge_identity(reward: Reward) -> dict[str, Any] | None:
    """What decides a judge's scores: its weights and its code; None if it does not say, as one behind a server."""
    kind = reward.kind if isinstance(reward, Visitor) else type(reward)
    provenance = reward.provenance()
    if "sha256" not in provenance and not kind.pure:
        return None
    try:
        file = inspect.getsourcefile(kind)
    except (OSError, TypeError):
        return None
    if file is None or not Path(file).is_file():
        return None
    return {**provenance, "code": hashlib.sha256(Path(file).read_bytes()).hexdigest()}


@functools.cache
def code_hash() -> str:
    """SHA-256 over the sources that an evaluation runs."""
    package = Path(str(flowbench.__file__)).parent
    folders = [*(package / room for room in ROOMS), Path(importlib.import_module("flowbench.rewards").__path__[0])]
    files = [*package.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    whole = hashlib.sha256()
    for file in sorted(files):
        whole.update(file.name.encode() + file.read_bytes())
    return whole.hexdigest()
