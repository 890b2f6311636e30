"""Which trial a search selects. It sees the reward trained on and the diversity, on `dev`, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowbench.evaluation.statistics.targets import FLOOR


@dataclass(frozen=True)
class DevResult:
    """The end of a run's budget on `dev`, tuned and base model: all that a selection may know of a run.

    reward: the mean of the reward trained on; diversity: the raw value.
    """

    reward: float
    base_reward: float
    diversity: float
    base_diversity: float

    @property
    def gain(self) -> float:
        """Reward, tuned minus base."""
        return self.reward - self.base_reward

    @property
    def kept(self) -> float:
        """Share of the base model's diversity; NaN where that is none."""
        return self.diversity / self.base_diversity if self.base_diversity else math.nan


@dataclass(frozen=True)
class Candidate:
    """A trial as a selection sees it: its number, and a result per seed, None where the run failed."""

    number: int
    results: tuple[DevResult | None, ...]

    @property
    def first(self) -> Candidate:
        """The same with its first run alone."""
        return Candidate(self.number, self.results[:1])

    @property
    def failed(self) -> bool:
        """Whether a run failed, or ended in no number, or there was none."""
        known = [r for r in self.results if r is not None and math.isfinite(r.reward) and math.isfinite(r.kept)]
        return not known or len(known) < len(self.results)

    @property
    def reward(self) -> float:
        """Mean over seeds; NaN if it failed."""
        return math.nan if self.failed else float(np.mean([r.reward for r in self.results if r]))

    @property
    def gain(self) -> float:
        """Mean over seeds of the reward's change; NaN if it failed."""
        return math.nan if self.failed else float(np.mean([r.gain for r in self.results if r]))

    @property
    def kept(self) -> float:
        """Share of the base model's diversity, mean over seeds; NaN if it failed."""
        return math.nan if self.failed else float(np.mean([r.kept for r in self.results if r]))

    @property
    def collapsed(self) -> bool:
        """Whether it keeps too little diversity."""
        return not self.failed and self.kept < FLOOR

    @property
    def qualifies(self) -> bool:
        """Whether it may be selected."""
        return not self.failed and not self.collapsed


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that may be selected, the best first: the highest mean reward, of equal ones the earliest."""
    return sorted((c for c in candidates if c.qualifies), key=lambda c: (-c.reward, c.number))


def finalists(candidates: Sequence[Candidate], count: int) -> tuple[int, ...]:
    """The numbers of the `count` best, fewer where fewer qualify."""
    return tuple(c.number for c in ranked(candidates)[:count])


def select(candidates: Sequence[Candidate], seeds: int) -> Candidate | None:
    """The best of those that have a run for each of so many seeds; None if none qualifies."""
    complete = [c for c in candidates if len(c.results) >= seeds]
    return next(iter(ranked(complete)), None)


def worth(candidates: Sequence[Candidate]) -> list[float]:
    """What each trial's first run gains, in the order of preference, for `expected_best`.

    A trial that does not qualify comes last and gains nothing: whoever finds only such trials keeps the base model.
    """
    first = [c.first for c in candidates]
    gains = [c.gain for c in ranked(first)]
    return gains + [0.0] * (len(first) - len(gains))
