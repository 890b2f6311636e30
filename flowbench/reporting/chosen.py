"""What searches selected, as their chosen.yaml say it: read for tables and the page, written by a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from flowbench import escape
from flowbench.errors import UsageError
from flowbench.files import write_atomically
from flowbench.reading.documents import DocumentError, read_yaml
from flowbench.reporting.documents import markdown_rows
from flowbench.workloads import Workload, first_fault

CHOSEN = "chosen.yaml"
STEPS = (1, 2, 5, 10, 20)  # of k, for which the best of k trials is shown


class Written(BaseModel):
    """A document of a search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def save(self, path: Path) -> None:
        """Write it as YAML, to a temporary name first."""
        write_atomically(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


class Chosen(Written):
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


def read_chosen(path: Path) -> Chosen:
    """Read a chosen.yaml.

    Raises UsageError for a file that is none.
    """
    try:
        return Chosen.model_validate(read_yaml(path))
    except (DocumentError, ValidationError) as error:
        raise UsageError(f"'{path}' is no chosen.yaml of a search: {first_fault(error)}") from error


def find_chosen(folder: Path) -> tuple[Chosen, ...]:
    """All that lie below a folder, by algorithm, workload and study; none where it does not exist.

    Raises UsageError for a file that is no chosen.yaml.
    """
    found = [read_chosen(path) for path in sorted(folder.rglob(CHOSEN))]
    return tuple(sorted(found, key=lambda c: (c.algorithm, c.workload.name, c.ruleset or "", c.study)))


def growth(chosen: Chosen) -> tuple[tuple[int, float], ...]:
    """How the best of k trials grows: k, and its gain on dev in the mean, at a few k and the last."""
    last = len(chosen.best_of)
    steps = [k for k in STEPS if k < last] + ([last] if last else [])
    return tuple((k, chosen.best_of[k - 1]) for k in steps)


def shown_settings(chosen: Chosen) -> str:
    """The selected settings, numbers to three digits; why there are none."""
    if chosen.selected is None:
        return chosen.reason
    return ", ".join(f"{key}={_short(value)}" for key, value in chosen.settings.items())


def searches_markdown(found: Sequence[Chosen]) -> str:
    """A table of searches: what each selected, from how many trials, at which edges, and how the best of k grows."""
    headings = ["algorithm", "workload", "search", "trials", "chosen", "gain on dev", "best of k trials", "at an edge"]
    lines = []
    for c in found:
        study = f"{c.ruleset or 'outside of the rules'}" + (f", study {c.study + 1}" if len(c.run_seeds) == 1 else "")
        trials = f"{c.trials}" + (f" ({c.failed} failed, {c.collapsed} collapsed)" if c.failed + c.collapsed else "")
        gain = "none" if c.gain is None else f"{c.gain:+.4f}"
        best = ", ".join(f"{k}: {value:+.4f}" for k, value in growth(c))
        cells = [c.algorithm, c.workload.name, study, trials, shown_settings(c), gain, best, "; ".join(c.edges) or "no"]
        lines.append([escape.markdown(cell) for cell in cells])
    return markdown_rows(headings, lines)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
