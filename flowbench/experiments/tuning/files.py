"""What a search leaves beside its log: trials.csv, and chosen.yaml with the setting that it selected."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from flowbench.escape import csv as csv_text
from flowbench.experiments.tuning.journal import Attempt, Trial
from flowbench.reporting.chosen import CHOSEN, Chosen, Written, read_chosen
from flowbench.workloads import Workload

__all__ = ["CHOSEN", "STUDIES", "TRIALS", "Chosen", "Studies", "median_gain", "read_chosen", "state", "trials_csv"]

TRIALS, STUDIES = "trials.csv", "studies.yaml"


class Studies(Written):
    """The results of several studies of one algorithm. median: of their gains on dev; a study without a selected trial
    counts as the lowest, and the median is None where such a one is in the middle."""

    algorithm: str
    workload: Workload
    workload_hash: str
    ruleset: str | None
    gains: tuple[float | None, ...]
    median: float | None
    files: tuple[str, ...]


def median_gain(gains: Sequence[float | None]) -> float | None:
    """The middle one; of an even number the mean of the two; None for a study that selected nothing."""
    found = sorted(gains, key=lambda gain: float("-inf") if gain is None else gain)
    low, high = found[(len(found) - 1) // 2], found[len(found) // 2]
    return None if low is None or high is None else (low + high) / 2


def state(trial: Trial, selected: int | None, finalists: Sequence[int]) -> str:
    """What became of a trial, in a word."""
    candidate = trial.candidate
    if candidate.failed:
        return "failed" if trial.attempts else "waiting"
    if candidate.collapsed:
        return "collapsed"
    if trial.number == selected:
        return "selected"
    return "finalist" if trial.number in finalists else "done"


def trials_csv(trials: Sequence[Trial], selected: int | None, finalists: Sequence[int]) -> str:
    """A line per run, numbers unrounded."""
    names = list(dict.fromkeys(key for trial in trials for key in trial.settings))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    scores = ["reward", "base_reward", "diversity", "base_diversity"]
    writer.writerow(["trial", *names, "seed", *scores, "state", "run", "failure"])
    for trial in trials:
        head = [trial.number, *(_cell(trial.settings.get(name)) for name in names)]
        for attempt in trial.attempts or (None,):
            writer.writerow([*head, *_run(attempt, scores), state(trial, selected, finalists), *_tail(attempt)])
    return buffer.getvalue()


def _run(attempt: Attempt | None, scores: Sequence[str]) -> list[Any]:
    if attempt is None:
        return [""] * (1 + len(scores))
    return [attempt.seed, *("" if attempt.result is None else getattr(attempt.result, name) for name in scores)]


def _tail(attempt: Attempt | None) -> list[str]:
    return ["", ""] if attempt is None else [attempt.run, _cell(attempt.failure or "")]


def _cell(value: Any) -> Any:
    """Text that a spreadsheet does not take for a formula; numbers as they are."""
    return csv_text(value) if isinstance(value, str) else value
