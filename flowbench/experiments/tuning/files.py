"""What a search leaves beside its log: trials.csv, and chosen.yaml with the setting that it selected."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from flowbench.errors import UsageError
from flowbench.escape import csv as csv_text
from flowbench.experiments.tuning.journal import Attempt, Trial
from flowbench.files import write_atomically
from flowbench.reading.documents import DocumentError, read_yaml
from flowbench.workloads import Workload, first_fault

TRIALS, CHOSEN, STUDIES = "trials.csv", "chosen.yaml", "studies.yaml"


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def save(self, path: Path) -> None:
        """Write it as YAML, to a temporary name first."""
        write_atomically(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


class Chosen(_File):
    """What a study selected, and everything that is needed to doubt it.

    ruleset: None if the search is not that of a ruleset, and then `deviations` say how. run_seeds: of the search's
    runs. selected: the trial's number, None if none qualifies. gain: of the reward on dev, tuned minus base, mean over
    `seeds_of_selected`; kept: share of the base's diversity. edges: selected settings at an end of their range.
    best_of: the gain that the best of k first runs has in the mean, for k = 1, 2, ... log_sha256: of journal.log.
    """

    algorithm: str
    workload: Workload
    workload_hash: str
    ruleset: str | None
    deviations: tuple[str, ...]
    study: int
    sampler: str
    scramble_seed: int
    run_seeds: tuple[int, ...]
    trials: int
    failed: int
    collapsed: int
    selected: int | None
    reason: str
    settings: dict[str, Any]
    seeds_of_selected: tuple[int, ...]
    reward: float | None
    gain: float | None
    kept: float | None
    edges: tuple[str, ...]
    best_of: tuple[float, ...]
    space: dict[str, str]
    fixed: dict[str, Any]
    refused_choices: tuple[str, ...]
    log: str
    log_sha256: str
    commit: str | None
    versions: dict[str, str]


class Studies(_File):
    """The results of several studies of one algorithm. median: of their gains on dev; a study without a selected trial
    counts as the lowest, and the median is None where such a one is in the middle."""

    algorithm: str
    workload: Workload
    workload_hash: str
    ruleset: str | None
    gains: tuple[float | None, ...]
    median: float | None
    files: tuple[str, ...]


def read_chosen(path: Path) -> Chosen:
    """Read a chosen.yaml.

    Raises UsageError for a file that is none.
    """
    try:
        return Chosen.model_validate(read_yaml(path))
    except (DocumentError, ValidationError) as error:
        raise UsageError(f"'{path}' is no chosen.yaml of a search: {first_fault(error)}") from error


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
