"""Records to tables: rows per algorithm with means over seeds and bootstrap intervals; nobody types a score."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowbench.errors import UsageError
from flowbench.evaluation.statistics import mean_ci95
from flowbench.record import RANDOM, Record
from flowbench.terms import UNGUIDED, plain_metric, trained_metrics

HEADLINE = ("oracle_exact", "oracle_soft", "diversity", "w2")


@dataclass(frozen=True)
class Cell:
    """Mean over seeds, with the 95 % bootstrap interval over seeds (None for a single seed)."""

    mean: float
    ci95: tuple[float, float] | None

    def text(self, signed: bool = True) -> str:
        """ "+0.083 [+0.071, +0.094]"."""
        form = "{:+.3f}" if signed else "{:.3f}"
        interval = f" [{form}, {form}]".format(*self.ci95) if self.ci95 else ""
        return form.format(self.mean) + interval


@dataclass(frozen=True)
class Row:
    """One algorithm on one model, reward, budget and protocol.

    gains: tuned minus base per metric; retained: tuned over base, of the diversities among them; seconds: mean of the
    training time.
    """

    model: str
    reward: str
    images: int
    protocol: str
    algorithm: str
    config_hash: str
    seeds: int
    gains: dict[str, Cell]
    retained: dict[str, Cell]
    seconds: float


def rows(records: Sequence[Record], split: str) -> list[Row]:
    """One row per (model, reward, images, protocol, algorithm, configuration), best truth first.

    Records of models with random weights are left out.
    Raises UsageError when there are no records, or none with that split.
    """
    records = [record for record in records if not record.model.endswith(RANDOM)]
    if not records:
        raise UsageError("no records found; a finished run leaves one in its folder, see 'flowbench list runs'")
    groups: dict[tuple[str, str, int, str, str, str], list[Record]] = {}
    for r in records:
        if any(key.endswith(f"/{split}") for key in r.scores):
            groups.setdefault(
                (r.model, r.reward, r.budget.images, r.protocol_hash, r.algorithm, r.config_hash), []
            ).append(r)
    if not groups:
        known = sorted({key.split("/")[1] for r in records for key in r.scores})
        raise UsageError(f"no record has the split '{split}'; there are: {', '.join(known)}")
    table = [_row(key, group, split) for key, group in groups.items()]

    def order(row: Row) -> tuple[str, str, int, str, float]:
        lead = next((row.gains[m] for m in ("oracle_exact", *trained_metrics(row.reward)) if m in row.gains), None)
        return (row.model, row.reward, row.images, row.protocol, -(lead.mean if lead else 0.0))

    return sorted(table, key=order)


def _row(key: tuple[str, str, int, str, str, str], group: list[Record], split: str) -> Row:
    model, reward, images, protocol, algorithm, config_hash = key
    shared = set.intersection(*(set(r.scores) for r in group))  # judges may have been added between two seeds
    metrics = [m.split("/")[0] for m in group[0].scores if m.endswith(f"/{split}") and m in shared]
    gains = {m: over_seeds([r.scores[f"{m}/{split}"].change for r in group]) for m in metrics}
    retained = {
        m: over_seeds([r.scores[f"{m}/{split}"].tuned / r.scores[f"{m}/{split}"].base for r in group])
        for m in metrics
        if plain_metric(m) == "diversity"
    }
    seconds = float(np.mean([r.budget.seconds for r in group]))
    seeds = len({r.seed for r in group})
    return Row(model, reward, images, protocol, algorithm, config_hash, seeds, gains, retained, seconds)


def over_seeds(values: list[float]) -> Cell:
    """The cell of one value per seed."""
    array = np.array(values)
    return Cell(float(array.mean()), mean_ci95(array) if len(array) > 1 else None)


def columns(table: Sequence[Row]) -> list[str]:
    """Metrics of all rows: rewards first, then truth, diversity and divergence."""
    seen = {m: None for row in table for m in row.gains}
    place = {name: k for k, name in enumerate(HEADLINE)}
    return sorted(seen, key=lambda m: (place.get(plain_metric(m), -1), m))


def cells(row: Row, metrics: Sequence[str]) -> list[str]:
    """A row as text; metrics that were trained on are marked with *."""
    values, trained_on = [], trained_metrics(row.reward)
    for metric in metrics:
        cell = row.gains.get(metric)
        if metric in row.retained:
            values.append(f"x {row.retained[metric].text(signed=False)}")
        else:
            values.append((cell.text() + ("*" if plain_metric(metric) in trained_on else "")) if cell else "")
    return [row.model, row.reward, row.algorithm, str(row.seeds), str(row.images), *values, f"{row.seconds:.0f}"]


def headings(metrics: Sequence[str]) -> list[str]:
    """Column headings that go with `cells`."""
    return ["model", "reward", "algorithm", "seeds", "images", *metrics, "seconds"]


def to_markdown(table: Sequence[Row]) -> str:
    """A Markdown table with a legend."""
    metrics = columns(table)
    legend = LEGEND + (f" {UNGUIDED_LEGEND}" if any(m.endswith(UNGUIDED) for m in metrics) else "")
    return f"{markdown_table(headings(metrics), [cells(row, metrics) for row in table])}\n\n{legend}\n"


def markdown_table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells below their titles."""
    everything = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(value.replace("|", "\\|") for value in line) + " |" for line in everything)


LEGEND = (
    "Differences tuned minus base on the same prompts and noise, with 95 % bootstrap intervals over seeds; "
    "\\* the reward trained on; diversity as a share of the base model's; seconds of training."
)

UNGUIDED_LEGEND = f"{UNGUIDED}: sampled without guidance; the others at the model's own scale."

CSV_COLUMNS = (
    *("model", "reward", "algorithm", "config_hash", "protocol_hash", "seeds", "images"),
    *("metric", "gain", "low", "high", "seconds"),
)


def to_csv(table: Sequence[Row]) -> str:
    """One line per row and metric, numbers unrounded."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in table:
        run = [row.model, row.reward, row.algorithm, row.config_hash, row.protocol, row.seeds, row.images]
        for metric, cell in row.gains.items():
            low, high = cell.ci95 or ("", "")
            writer.writerow([*run, metric, cell.mean, low, high, row.seconds])
    return buffer.getvalue()
