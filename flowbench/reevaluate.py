"""`flowbench evaluate`: score a run's models again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import RunConfig, resolve_config
from .errors import UsageError
from .presets import load_preset
from .prompts import load_split
from .record import Score, write_atomically
from .run import build_judges, build_reward, compare, evaluate_pairs, load_tuned, pick_device


@dataclass(frozen=True)
class Reevaluation:
    """Scores of a run's base and tuned model, keyed as in a record."""

    algorithm: str
    reward: str
    seed: int
    scores: dict[str, Score]

    def save(self, path: Path) -> None:
        """Write the scores as JSON."""
        content = {name: score.model_dump(mode="json") for name, score in self.scores.items()}
        write_atomically(path, json.dumps(content, indent=1) + "\n")


def reevaluate(
    folder: Path, overrides: dict[str, Any], device: str, progress: Callable[[int, int], None]
) -> Reevaluation:
    """Evaluate a run folder with its own protocol, or one changed by `evaluation.*` overrides.

    Raises UsageError for a folder that holds no run, or an override of anything but the evaluation.
    """
    for key in overrides:
        if not key.startswith("evaluation."):
            raise UsageError(f"cannot change '{key}' of a finished run; only evaluation.* settings")
    where = pick_device(device)
    policy, config = load_tuned(folder, where)
    config = _with_protocol(config, overrides)
    preset = load_preset(config.model)
    splits = [load_split(preset.prompts, name) for name in config.evaluation.splits]
    judges = build_judges(config.reward, build_reward(config.reward, preset, where), preset, where)
    pairs = evaluate_pairs(policy, splits, judges, config, progress)
    return Reevaluation(config.algorithm, config.reward, config.seed, compare(pairs))


def _with_protocol(config: RunConfig, overrides: dict[str, Any]) -> RunConfig:
    if not overrides:
        return config
    protocol = {f"evaluation.{k}": v for k, v in config.evaluation.model_dump().items()}
    changed = resolve_config(config.algorithm, config.reward, config.model, overrides={**protocol, **overrides})
    return config.model_copy(update={"evaluation": changed.evaluation})
