"""`flowbench compare`: algorithms on the same rewards and seeds, and what their differences are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbench.errors import RunError, UsageError, did_you_mean
from flowbench.evaluation.statistics import Ranking, gains_from_records
from flowbench.evaluation.statistics import compare as rank
from flowbench.experiments.study import Outcome
from flowbench.experiments.suite import Cell, cell
from flowbench.models.presets import load_preset
from flowbench.names import path_name
from flowbench.reporting.plots import TRUTH
from flowbench.sections import TrainingConfig
from flowbench.terms import parse_reward, spell, trained_metrics
from flowbench.workloads import Workload


@dataclass(frozen=True)
class Comparison:
    """All algorithms on one workload in one metric.

    trained: whether the runs were trained on that metric; failures: a line for each run that failed.
    """

    workload: Workload
    metric: str
    split: str
    trained: bool
    ranking: Ranking
    failures: tuple[str, ...]


def plan(
    algorithms: Sequence[str],
    rewards: Sequence[str],
    seeds: Sequence[int],
    model: str,
    images: int | None,
    settings: Mapping[str, Any],
    *,
    device: str,
    output: Path,
    plugins: Sequence[Path] = (),
    prompts: str | None = None,
) -> list[Cell]:
    """The runs of every algorithm on every reward with every seed; images: None is the model's own budget.

    Raises UsageError for fewer than two algorithms, one that stands twice, no reward, an unknown name or a wrong
    setting.
    """
    if len(set(algorithms)) < len(algorithms) or len(algorithms) < 2:
        raise UsageError("name two or more different algorithms to compare; see 'flowbench list algorithms'")
    if not rewards:
        raise UsageError("--rewards names no reward; write for example --rewards clip,aesthetic")
    preset = load_preset(model)
    budget = images or preset.training.get("images", TrainingConfig.model_fields["images"].default)
    cells = []
    for reward in dict.fromkeys(spell(parse_reward(text)) for text in rewards):
        name = path_name(f"{preset.name}-{reward}")
        workload = Workload(name=name, model=model, reward=reward, prompts=prompts, images=budget)
        for algorithm in algorithms:
            where: dict[str, Any] = {"device": device, "output": output, "plugins": plugins}
            cells.append(cell(workload, algorithm, seeds, settings, **where))
    return cells


def check_split(cells: Sequence[Cell], split: str) -> None:
    """Raise UsageError for a split on which no run would be evaluated."""
    known = {name for c in cells for job in c.jobs for name in job.config.evaluation.splits}
    if known and split not in known:
        raise UsageError(f"the runs are not evaluated on '{split}'{did_you_mean(split, known)}")


def comparisons(cells: Sequence[Cell], outcomes: Sequence[Outcome], split: str) -> list[Comparison]:
    """What the finished runs say of each workload, in the metrics trained on and in the truth where it is known.

    Raises RunError when no run finished, UsageError when none has the split.
    """
    if not any(outcome.record for outcome in outcomes):
        failures = [outcome.failure for outcome in outcomes if outcome.failure]
        raise RunError(f"every run failed; the first: {failures[0]}" if failures else "there is nothing to run")
    found: list[Comparison] = []
    for workload in dict.fromkeys(c.workload.name for c in cells):
        found += _of_workload([c for c in cells if c.workload.name == workload], outcomes, split)
    return found


def _of_workload(cells: Sequence[Cell], outcomes: Sequence[Outcome], split: str) -> list[Comparison]:
    workload = cells[0].workload
    folders = {job.folder for c in cells for job in c.jobs}
    mine = [outcome for outcome in outcomes if outcome.job.folder in folders]
    records = [outcome.record for outcome in mine if outcome.record]
    failed = [(o.job.config.algorithm, o.job.config.seed) for o in mine if o.failure]
    trained = trained_metrics(workload.reward)
    known = {key for record in records for key in record.per_prompt}
    metrics = [m for m in (*sorted(trained), TRUTH) if f"{m}/{split}" in known]
    if records and not metrics:
        splits = sorted({key.rpartition("/")[2] for key in known})
        raise UsageError(f"the runs have no scores per prompt on '{split}'; there are: {', '.join(splits)}")
    lines = tuple(f"{o.job.label}: {o.failure}" for o in mine if o.failure)
    return [
        Comparison(workload, m, split, m in trained, rank(gains_from_records(records, m, split, failed)), lines)
        for m in dict.fromkeys(metrics)
    ]
