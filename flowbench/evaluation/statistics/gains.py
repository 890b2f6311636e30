"""Gains of several algorithms on the same prompts: what every comparison is computed from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from flowbench.errors import UsageError, did_you_mean
from flowbench.record import Record


@dataclass(frozen=True, eq=False)
class Gains:
    """Tuned minus base of A algorithms, K seeds and P prompts.

    values (A, K, P) float64; seed k of every algorithm is evaluated on noise block k, and every algorithm on the same
    prompts, so that algorithms are paired by both. A run without a result is a row of nan: it was never made, or it is
    in `failed`, pairs of algorithm and seed.
    Raises ValueError for shapes that do not fit, a name or seed that stands twice, a row that is nan in part, and a
    failed run that has values or is none of the table.
    """

    algorithms: tuple[str, ...]
    seeds: tuple[int, ...]
    values: np.ndarray
    failed: frozenset[tuple[str, int]] = frozenset()

    def __post_init__(self) -> None:
        shape = (len(self.algorithms), len(self.seeds))
        if self.values.ndim != 3 or self.values.shape[:2] != shape or self.values.shape[2] == 0:
            raise ValueError(f"gains of {shape[0]} algorithms and {shape[1]} seeds have shape {self.values.shape}")
        if len(set(self.algorithms)) < shape[0] or len(set(self.seeds)) < shape[1]:
            raise ValueError("an algorithm or a seed stands twice")
        missing = ~np.isfinite(self.values)
        if (missing.any(-1) != missing.all(-1)).any():
            raise ValueError("a run has values for some prompts only")
        finished = {(self.algorithms[a], self.seeds[k]) for a, k in np.argwhere(~missing.all(-1))}
        known = {(a, k) for a in self.algorithms for k in self.seeds}
        if self.failed & finished or not self.failed <= known:
            raise ValueError("a failed run has values, or is not of these algorithms and seeds")

    def of(self, algorithm: str) -> np.ndarray:
        """Its finished runs, (k, P) with k <= K, by seed.

        Raises UsageError for an algorithm that is not there or has no finished run.
        """
        rows = self._rows(algorithm)
        finished = rows[np.isfinite(rows[:, 0])]
        if not len(finished):
            raise UsageError(f"'{algorithm}' has no finished run; leave it out or run its seeds again")
        return finished

    def paired(self, one: str, other: str) -> np.ndarray:
        """Both algorithms' gains for the k seeds that both have finished, (2, k, P); k may be 0."""
        both = np.stack([self._rows(one), self._rows(other)])
        return both[:, np.isfinite(both[:, :, 0]).all(0)]

    def failures(self, *algorithms: str) -> int:
        """How many seeds failed for at least one of these algorithms."""
        return len({seed for name, seed in self.failed if name in algorithms})

    def _rows(self, algorithm: str) -> np.ndarray:
        if algorithm not in self.algorithms:
            raise UsageError(f"unknown algorithm '{algorithm}'{did_you_mean(algorithm, self.algorithms)}")
        return self.values[self.algorithms.index(algorithm)]


def gains_from_records(
    records: Sequence[Record],
    metric: str,
    split: str,
    failed: Collection[tuple[str, int]] = (),
    label: Callable[[Record], str] = lambda record: record.algorithm,
) -> Gains:
    """The gains of runs in one metric, such as "oracle_exact", on one split.

    label: what tells rows apart, its algorithm unless told; failed: label and seed of runs that left no record.
    Raises UsageError when no record has the metric, a label and seed stand twice, or prompts differ.
    """
    key, found, prompts = f"{metric}/{split}", {}, None
    for record in records:
        if key not in record.per_prompt:
            continue
        place = (label(record), record.seed)
        if place in found:
            raise UsageError(f"two records are of '{place[0]}' with seed {place[1]}; keep one or tell them apart")
        if prompts is not None and record.prompts[split] != prompts:
            raise UsageError(f"'{place[0]}' with seed {place[1]} has other {split} prompts; evaluate it on the same")
        prompts = record.prompts[split]
        scores = record.per_prompt[key]
        found[place] = np.array(scores["tuned"], dtype=np.float64) - np.array(scores["base"], dtype=np.float64)
    if not found:
        raise UsageError(f"no record has per-prompt values of '{key}'; evaluate the runs with that metric and split")
    places = [*found, *failed]
    algorithms = tuple(dict.fromkeys(name for name, _ in places))
    seeds = tuple(sorted({seed for _, seed in places}))
    values = np.full((len(algorithms), len(seeds), len(next(iter(found.values())))), np.nan)
    for (name, seed), row in found.items():
        values[algorithms.index(name), seeds.index(seed)] = row
    return Gains(algorithms, seeds, values, frozenset(failed))
