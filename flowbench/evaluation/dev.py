"""Scores on split `dev`, from which settings are selected and stopping is judged: never read by a report."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from flowbench.config import EvaluationConfig, RunConfig
from flowbench.evaluation.base_scores import BaseScores
from flowbench.evaluation.judges import trained_on
from flowbench.evaluation.protocol import Judges, Portions, SplitScores, score_split
from flowbench.models.policy import Policy
from flowbench.models.presets import ModelPreset
from flowbench.models.texts import TextCache
from flowbench.names import path_name
from flowbench.prompts import PromptSplit, available_splits, load_split
from flowbench.prompts.needs import unmet
from flowbench.registry import rewards
from flowbench.reward import Reward
from flowbench.scoring.combination import WeightedSum
from flowbench.terms import term_names

DEV = "dev"
TRUTHS = ("oracle_exact", "oracle_soft")

logger = logging.getLogger("flowbench")


@dataclass(frozen=True)
class DevScores:
    """Means by metric, and of the reward trained on and the truth also each prompt's score."""

    means: dict[str, float]
    per_prompt: dict[str, list[float]]


class DevScorer(Protocol):
    """Scores a run's model as it stands, the same way each time and without a trace in what is trained."""

    def base(self) -> DevScores:
        """The scores of the model before tuning."""

    def current(self) -> DevScores:
        """The scores of the weights in use."""


def dev_split(config: RunConfig, preset: ModelPreset) -> PromptSplit | None:
    """The prompts that a run's points are scored on; None, with a word why, where there are none or no points."""
    prompt_set = config.prompt_set(preset)
    if not config.evaluation.points:
        return None
    if DEV not in available_splits(prompt_set):
        logger.warning("prompts '%s' have no split 'dev': the run is not scored on the way", prompt_set)
        return None
    split = load_split(prompt_set, DEV)
    for name in term_names(config.reward):
        if fault := unmet(rewards.describe(name), prompt_set, [split]):
            logger.warning("the run is not scored on the way: reward '%s' cannot score split 'dev', %s", name, fault)
            return None
    return split


def dev_protocol(config: RunConfig) -> EvaluationConfig:
    """The protocol of a run's points: the evaluation's own, with fewer images and with the model's guidance alone."""
    images = config.evaluation.dev_images_per_prompt
    return config.protocol().model_copy(
        update={"splits": (DEV,), "images_per_prompt": images, "unguided": False, "keep_images": False}
    )


class ImageDev:
    """Scores of images for the prompts of a split: the reward trained on, the truth, judges, w2 and diversity.

    The names are those of the final scores. The reward trained on has its own also where it has none there: the truth
    itself, and a sum of rewards as they are.
    """

    def __init__(
        self, policy: Policy, reward: Reward, judges: Judges, config: RunConfig, split: PromptSplit, prompt_set: str
    ) -> None:
        self.policy, self.split, self.protocol = policy, split, dev_protocol(config)
        self.name, self.reward = path_name(config.reward), reward
        self.trained = {path_name(name): part for name, part in trained_on(config, reward).items()}
        self.judges = _dev_judges(judges, self.trained, config.evaluation.dev_judges, prompt_set, split)
        self.portions = Portions(policy, self.protocol)
        self.texts: TextCache | None = None

    def base(self) -> DevScores:
        """As in `DevScorer`; from the disk where they are kept there."""
        with self._apart():
            kept = BaseScores(self.policy, self.judges, self.protocol)
            scores, _ = kept.scores(self.split, portions=self.portions)
            self.judges.dismiss()
        return self._told(scores)

    def current(self) -> DevScores:
        """As in `DevScorer`."""
        with self._apart():
            scores = score_split(
                self.policy, "current", self.split, self.judges, self.protocol, lambda images: None, self.portions
            )
            self.judges.dismiss()
        return self._told(scores)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """As `apart`; nor does it show in the evaluation which texts were encoded together with others here."""
        texts, self.texts = self.policy.texts, self.texts or self.policy.texts.branch()
        self.policy.texts = self.texts
        try:
            with apart(self.policy):
                yield
        finally:
            self.policy.texts = texts

    def _told(self, split: SplitScores) -> DevScores:
        scores = dict(split.scores)
        if self.name not in scores and (own := self._own(scores)) is not None:
            scores[self.name] = own
        kept = {self.name, *self.trained, *TRUTHS}
        return DevScores(
            {metric: float(values.mean()) for metric, values in scores.items()},
            {metric: values.tolist() for metric, values in scores.items() if metric in kept},
        )

    def _own(self, scores: dict[str, np.ndarray]) -> np.ndarray | None:
        """The reward trained on per prompt, from other scores; None for a sum whose scale moves during training."""
        parts = {name: _part(name, scores) for name in self.trained}
        if not isinstance(self.reward, WeightedSum):
            return parts[self.name]
        if self.reward.standardized:
            return None
        weighted = [(w, parts[path_name(name)]) for name, w in self.reward.coefficients.items()]
        return np.sum([w * part for w, part in weighted if part is not None], axis=0)


def _part(name: str, scores: dict[str, np.ndarray]) -> np.ndarray | None:
    if name == "oracle" and name not in scores:  # the reward is the mean of its two verdicts
        return (scores[TRUTHS[0]] + scores[TRUTHS[1]]) / 2
    return scores.get(name)


def _dev_judges(
    judges: Judges, trained: dict[str, Reward], held_out: bool, prompt_set: str, split: PromptSplit
) -> Judges:
    """Those who score at the points: the reward trained on first, and of the judges those that the prompts suffice."""
    own = {name: part for name, part in trained.items() if not (name == "oracle" and judges.oracle)}
    others = {}
    for name in judges.held_out if held_out else ():
        if fault := unmet(judges.rewards[name].info, prompt_set, [split]):
            logger.warning("'%s' does not score on the way: %s", name, fault)
        else:
            others[name] = judges.rewards[name]
    return replace(judges, rewards={**own, **others}, held_out=tuple(others))


@contextmanager
def apart(policy: Policy) -> Iterator[None]:
    """Within it random numbers are drawn as if by another process: training goes on with those that it would have."""
    generator = policy.generator
    devices = [policy.device] if policy.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        policy.generator = generator
