"""Base and tuned model side by side: scored on the same prompts and the same noise, and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flowbench.config import EvaluationConfig
from flowbench.evaluation.album import Album
from flowbench.evaluation.base_scores import BaseScores
from flowbench.evaluation.protocol import (
    Judges,
    Portions,
    SplitScores,
    by_category,
    count_images,
    score_split,
)
from flowbench.evaluation.statistics import mean_ci95
from flowbench.models.policy import Policy
from flowbench.prompts import Prompt, PromptSplit, spread
from flowbench.record import Score


@dataclass(frozen=True)
class Pair:
    """Scores of the base and of the tuned model on one split; cached: whether the base's were read from the disk."""

    base: SplitScores
    tuned: SplitScores
    cached: bool = False


def evaluate_pairs(
    policy: Policy,
    splits: list[PromptSplit],
    judges: Judges,
    protocol: EvaluationConfig,
    progress: Callable[[int, int], None],
    album: Album | None = None,
) -> dict[str, Pair]:
    """Score base and tuned model on each split, on the same prompts and noise.

    The base's scores come from the disk where they are kept, see `BaseScores`; album: keeps all images.
    """
    done, total = 0, 2 * count_images(policy, splits, protocol)

    def tick(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    portions, kept = Portions(policy, protocol), BaseScores(policy, judges, protocol)
    pairs: dict[str, Pair] = {}
    try:
        for split in splits:
            base_page, tuned_page = (album.of("base"), album.of("tuned")) if album else (None, None)
            base, cached = kept.scores(split, tick, portions, base_page)
            tuned = score_split(policy, "current", split, judges, protocol, tick, portions, tuned_page)
            pairs[split.name] = Pair(base, tuned, cached)
    finally:
        judges.dismiss()
    return pairs


def compare(pairs: dict[str, Pair]) -> dict[str, Score]:
    """Scores per metric and split, and for the oracle's also per category, with paired intervals over prompts."""
    scores = {}
    for split, pair in pairs.items():
        for metric in pair.base.scores:
            scores[f"{metric}/{split}"] = _score(pair.base.scores[metric], pair.tuned.scores[metric])
            if metric.startswith("oracle"):
                for (category, base), (_, tuned) in zip(
                    by_category(pair.base, metric), by_category(pair.tuned, metric), strict=True
                ):
                    scores[f"{metric}/{split}/{category}"] = _score(base, tuned)
    return scores


def _score(base: np.ndarray, tuned: np.ndarray) -> Score:
    return Score(base=float(base.mean()), tuned=float(tuned.mean()), diff_ci95=mean_ci95(tuned - base))


def evaluated_texts(splits: Sequence[PromptSplit], protocol: EvaluationConfig) -> list[Sequence[Prompt | str]]:
    """Groups of all prompts that an evaluation asks a model for; see `models.encoding.encode_ahead`."""
    return [[prompt for split in splits for prompt in spread(split, protocol.prompts)], [""]]
