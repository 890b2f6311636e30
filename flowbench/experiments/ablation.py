"""`flowbench ablate`: an algorithm's default against its declared ablations, over seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowbench.errors import RunError, UsageError, did_you_mean
from flowbench.escape import csv as csv_text
from flowbench.escape import markdown
from flowbench.evaluation.exact_study import KL
from flowbench.evaluation.exact_study import REWARD as EXACT
from flowbench.evaluation.statistics import Interval
from flowbench.experiments.study import Job, Outcome, make_job, spell
from flowbench.names import path_name
from flowbench.record import Record, read_metrics
from flowbench.registry import algorithms
from flowbench.reporting.audit.ablations import COLLAPSED, DEGRADED
from flowbench.reporting.columns import interval_text
from flowbench.reporting.documents import markdown_table
from flowbench.reporting.leaderboard import over_seeds
from flowbench.reporting.plots import TRUTH, Curve
from flowbench.settings import full_names
from flowbench.terms import parse_reward
from flowbench.training.checkpoint import METRICS

DEFAULT = "default"
EXPLAINED = "explained_variance"


@dataclass(frozen=True)
class Variant:
    """One choice of settings: its jobs, one per seed. repeats: its settings are those of the default anyway."""

    name: str
    jobs: tuple[Job, ...]
    repeats: bool


def plan(algorithm: str, overrides: dict[str, Any], seeds: int, split: str, **run: Any) -> list[Variant]:
    """The default and each declared ablation with seeds 0 to seeds - 1, compared on a split; `run` as in `make_job`.

    Raises UsageError when the algorithm declares none, or one that its own Config refuses, or for an unknown split.
    """
    declared = algorithms.get(algorithm).cls.ablations
    if not declared:
        raise UsageError(f"{algorithm} declares no ablations; add `ablations` to its class, see docs/ablate.md")
    settings = {DEFAULT: overrides}
    for changed in declared:
        name = ", ".join(f"{key}={spell(value)}" for key, value in changed.items())
        settings[name] = {**overrides, **full_names(changed)}
    made = {
        name: tuple(
            make_job(f"{name}, seed {seed}", algorithm, overrides=values, seed=seed, **run) for seed in range(seeds)
        )
        for name, values in settings.items()
    }
    splits = made[DEFAULT][0].config.evaluation.splits
    if split not in splits:
        raise UsageError(f"the runs are not evaluated on '{split}'{did_you_mean(split, splits)}")
    return [Variant(n, jobs, n != DEFAULT and jobs[0].folder == made[DEFAULT][0].folder) for n, jobs in made.items()]


def all_jobs(variants: Sequence[Variant]) -> list[Job]:
    """The runs to make, seed by seed, so that every variant has a first result early; none twice."""
    jobs: dict[Path, Job] = {}
    for same_seed in zip(*(v.jobs for v in variants), strict=True):
        for job in same_seed:
            jobs.setdefault(job.folder, job)
    return list(jobs.values())


@dataclass(frozen=True)
class Row:
    """One variant's result over the seeds that finished.

    values: reward, change, truth, kl, diversity, as far as the records have them; shares of the runs: degraded where
    the truth is known, collapsed; curves: the training reward and the critic's explained variance per sigma bucket.
    """

    variant: str
    repeats: bool
    runs: int
    failures: tuple[str, ...]
    values: dict[str, Interval]
    shares: dict[str, float]
    curves: dict[str, Curve]

    @property
    def explained(self) -> tuple[float, float, float] | None:
        """Explained variance in the thirds of training, averaged over the buckets; None if the algorithm logs none."""
        thirds = [curve.thirds() for name, curve in self.curves.items() if name.startswith(EXPLAINED)]
        if not thirds:
            return None
        first, middle, last = np.array(thirds).mean(0).tolist()
        return first, middle, last


def rows(variants: Sequence[Variant], outcomes: Sequence[Outcome], split: str) -> list[Row]:
    """A row per variant, the default first.

    Raises RunError when no run finished.
    """
    by_folder = {outcome.job.folder: outcome for outcome in outcomes}
    if not any(o.record for o in outcomes):
        raise RunError(f"every run of the study failed; the first: {outcomes[0].failure}")
    return [_row(v, [by_folder[job.folder] for job in v.jobs], split) for v in variants]


def _row(variant: Variant, outcomes: list[Outcome], split: str) -> Row:
    quantities = [_quantities(o.record, split) for o in outcomes if o.record]
    values = {name: [q[name] for q in quantities if name in q] for name in COLUMNS}
    wrong = {
        "degraded": [v < DEGRADED for v in values["truth"]],
        "collapsed": [v < COLLAPSED for v in values["diversity"]],
    }
    return Row(
        variant=variant.name,
        repeats=variant.repeats,
        runs=len(quantities),
        failures=tuple(f"seed {o.job.config.seed}: {o.failure}" for o in outcomes if o.failure),
        values={name: over_seeds(numbers) for name, numbers in values.items() if numbers},
        shares={name: float(np.mean(flags)) for name, flags in wrong.items() if flags},
        curves=_curves([o.job.folder / METRICS for o in outcomes]),
    )


def _quantities(record: Record, split: str) -> dict[str, float]:
    """What the table says of one run."""
    scores = {name.split("/")[0]: s for name, s in record.scores.items() if name.split("/")[1:] == [split]}
    base, tuned = (
        _reward(record.reward, {m: getattr(s, which) for m, s in scores.items()}) for which in ("base", "tuned")
    )
    values = {"reward": tuned, "change": tuned - base}
    if TRUTH in scores:
        values["truth"] = scores[TRUTH].change
    if KL in scores:
        values["kl"] = scores[KL].tuned
    if "diversity" in scores and scores["diversity"].base > 0:
        values["diversity"] = scores["diversity"].tuned / scores["diversity"].base
    return values


def _reward(reward: str, scores: dict[str, float]) -> float:
    """The reward that was trained on: exact on an analytic model, else from the scores of its terms.

    The truth's are the oracle's two verdicts.
    """
    if EXACT in scores:
        return scores[EXACT]
    total = 0.0
    for term in parse_reward(reward):
        metrics = ("oracle_exact", "oracle_soft") if term.name == "oracle" else (path_name(term.name),)
        total += term.weight * float(np.mean([scores[m] for m in metrics]))
    return total


def _curves(logs: list[Path]) -> dict[str, Curve]:
    """The training reward and the critic's explained variances, also of runs that failed on the way."""
    runs = [read_metrics(log) for log in logs if log.is_file()]
    images = np.array(max(([line["images"] for line in run] for run in runs), key=len, default=[]))
    names = dict.fromkeys(m for run in runs for line in run for m in line["metrics"] if m.startswith(EXPLAINED))
    curves = {}
    for name in ("reward", *sorted(names)):
        values = np.full((len(runs), len(images)), np.nan)
        for k, run in enumerate(runs):
            values[k, : len(run)] = [line.get(name, line["metrics"].get(name, np.nan)) for line in run]
        curves[name] = Curve(images, values)
    return curves


# Columns beside variant and runs; those before "degraded" are quantities of a run.
COLUMNS = {
    "reward": "of the tuned model",
    "change": "of the reward, tuned minus base",
    "truth": f"change of {TRUTH}",
    "kl": "from the base model, in nats",
    "diversity": "share of the base model's",
    "degraded": f"share of runs with truth below {DEGRADED:+}",
    "collapsed": f"share of runs with diversity below {COLLAPSED}",
    "explained variance": "of the critic, mean over sigma buckets, in the first, middle and last third of training",
}
SIGNED = ("change", "truth")


def headings(table: Sequence[Row]) -> list[str]:
    """Column headings: those that some row has something to say for."""
    filled = {name for row in table for name, text in _texts(row).items() if text}
    return ["variant", "runs", *(name for name in COLUMNS if name in filled)]


def legend(table: Sequence[Row]) -> str:
    """What the columns mean."""
    said = [f"{name}: {COLUMNS[name]}" for name in headings(table) if name in COLUMNS]
    return f"Means over seeds with 95 % t intervals over seeds. {'; '.join(said)}."


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """A row as text, under those headings."""
    texts = _texts(row)
    return [texts.get(name, "") for name in columns]


def _texts(row: Row) -> dict[str, str]:
    failed = f", {len(row.failures)} failed" if row.failures else ""
    texts = {"variant": row.variant + (" (as default)" if row.repeats else ""), "runs": f"{row.runs}{failed}"}
    texts |= {name: interval_text(found, signed=name in SIGNED) for name, found in row.values.items()}
    texts |= {name: f"{share:.0%}" for name, share in row.shares.items()}
    if row.explained:
        texts["explained variance"] = " ".join(f"{value:.2f}" for value in row.explained)
    return texts


def failures(table: Sequence[Row]) -> list[str]:
    """A line for every run that failed."""
    return [f"failed: {row.variant}, {failure}" for row in table for failure in row.failures]


def to_markdown(table: Sequence[Row]) -> str:
    """A Markdown table with a legend, and what failed."""
    columns = headings(table)
    text = f"{markdown_table(columns, [cells(row, columns) for row in table])}\n\n{legend(table)}\n"
    return text + "".join(f"\n- {markdown(line)}" for line in failures(table)) + ("\n" if failures(table) else "")


def to_csv(table: Sequence[Row]) -> str:
    """One line per variant and quantity, numbers unrounded."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["variant", "runs", "failed", "quantity", "mean", "low", "high"])
    for row in table:
        head = [csv_text(row.variant), row.runs, len(row.failures)]
        for name, found in row.values.items():
            ends = ("" if end is None else end for end in (found.low, found.high))
            writer.writerow([*head, name, found.value, *ends])
        for name, share in row.shares.items():
            writer.writerow([*head, name, share, "", ""])
        for name, curve in row.curves.items():
            if name.startswith(EXPLAINED):
                for part, value in zip(("first", "middle", "last"), curve.thirds(), strict=True):
                    writer.writerow([*head, f"{name} ({part} third)", value, "", ""])
    return buffer.getvalue()
