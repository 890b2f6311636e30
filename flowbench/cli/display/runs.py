"""What the command line prints of one run: its configuration, its scores, an evaluation; with rich."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table

from flowbench.cli.display.console import console
from flowbench.config import RunConfig
from flowbench.escape import terminal as escape
from flowbench.terms import UNGUIDED, plain_metric, trained_metrics

if TYPE_CHECKING:
    from flowbench.experiments.planning.plan import Plan
    from flowbench.experiments.reevaluate import Evaluation
    from flowbench.record import Record, Score

CATEGORY_METRICS = ("oracle_exact", "oracle_soft")
MARKS = {" *": "trained on", " °": "held out"}


def dry_run(config: RunConfig, plan: Plan | None = None) -> None:
    """The resolved configuration and its cost; with its memory and time if they were computed."""
    from flowbench.experiments.planning.counts import count

    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).strip()  # YAML itself escapes what is unseen
    console.print(text, highlight=False, markup=False)
    counts, t = count(config), config.training
    console.print(
        f"cost: {t.images} training images ({counts.training.total} function evaluations to sample them) in "
        f"{counts.iterations} iterations of {t.images_per_iteration}, {t.images} reward calls; "
        f"{counts.evaluation_images} images to evaluate"
        + (f"; {counts.dev.images} images on dev at the points of the budget" if counts.dev else "")
    )
    if plan is not None:
        from flowbench.cli.display.planning import show

        show(plan)


def scores(record: Record, folder: Path) -> None:
    """The table that ends a run, and where everything lies."""
    b = record.budget
    title = f"{record.algorithm} on {record.reward}, {record.model}, seed {record.seed}"
    score_table(record.scores, record.reward, title, tuple(record.judges))
    console.print(
        f"{b.images} images, {b.reward_calls} reward calls, {b.function_evaluations} function evaluations, "
        f"{b.seconds:.0f} s training + {b.evaluation_seconds:.0f} s evaluation, peak {b.peak_memory_mb / 1024:.2f} GB",
        soft_wrap=True,
    )
    parts = ("record.json", "curves.png", "metrics.png", "frontier.png", "samples/", "checkpoints/tuned/")
    there = ", ".join(part for part in parts if (folder / part).exists())
    console.print(escape(f"{folder}: {there}"), highlight=False, soft_wrap=True)


def evaluation(result: Evaluation) -> None:
    """What `evaluate` found: two models compared, or images scored."""
    if result.scores:
        score_table(result.scores, result.trained_on, result.title, result.held_out)
        return
    table = Table(title=escape(result.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("metric", "mean", "95 % interval", "prompts", "images"):
        table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=True)
    for metric, s in result.images.items():
        table.add_row(escape(metric), _number(s.mean), _interval(s.ci95), str(s.prompts), str(s.images))
    console.print(table)


def score_table(values: Mapping[str, Score], reward: str | None, title: str, held_out: Sequence[str] = ()) -> None:
    """Base, tuned and difference with its interval per metric and split; then the oracle's verdicts per category."""
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", no_wrap=True, max_width=22)
    table.add_column("split", no_wrap=True)
    for heading in ("base", "tuned", "change", "95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    plain = [key.split("/") for key in values if key.count("/") == 1]
    trained_on = trained_metrics(reward) if reward else ()
    marks = dict.fromkeys(held_out, " °") | dict.fromkeys(trained_on, " *")
    for metric, split in sorted(plain, key=lambda pair: list(dict.fromkeys(m for m, _ in plain)).index(pair[0])):
        s = values[f"{metric}/{split}"]
        table.add_row(
            escape(metric + marks.get(plain_metric(metric), "")),
            escape(_short(split)),
            _number(s.base),
            _number(s.tuned),
            _colored(_number(s.tuned - s.base, "+"), s, plain=plain_metric(metric) in ("w2", "kl")),
            _interval(s.diff_ci95, "+"),
        )
    console.print(table)
    legend = [f"{mark.strip()} {name}" for mark, name in MARKS.items() if mark in marks.values()]
    if any(metric.endswith(UNGUIDED) for metric, _ in plain):
        legend.append(f"{UNGUIDED} sampled without guidance")
    console.print("; ".join([*legend, "intervals: 95 % bootstrap over prompts"]), highlight=False)
    if any(key.count("/") == 2 for key in values):
        console.print(_category_table(values))


def _category_table(values: Mapping[str, Score]) -> Table:
    """Categories as rows; per split the oracle's exact verdicts, and the soft ones if the terminal is wide enough."""
    keys = [key.split("/") for key in values if key.count("/") == 2]
    splits_, categories = (list(dict.fromkeys(key[i] for key in keys)) for i in (1, 2))
    metrics = [m for m in CATEGORY_METRICS if any(key[0] == m for key in keys)]
    if console.width < 10 + 22 * len(splits_) * len(metrics):
        metrics = metrics[:1]
    table = Table(title="oracle per category", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("category", no_wrap=True)
    columns = [(m, s) for s in splits_ for m in metrics]
    for metric, split in columns:
        table.add_column(escape(f"{_short(split)} {metric.removeprefix('oracle_')}"), no_wrap=True)
    for category in categories:
        cells = [values.get(f"{metric}/{split}/{category}") for metric, split in columns]
        table.add_row(escape(category), *(_change(s) if s else "" for s in cells))
    return table


def _change(s: Score) -> str:
    return f"{s.base:.2f} -> {s.tuned:.2f} " + _colored(f"{s.tuned - s.base:+.2f}", s)


def _colored(text: str, s: Score, plain: bool = False) -> str:
    """Green or red when the interval of the difference lies on one side of zero."""
    low, high = s.diff_ci95 or (0.0, 0.0)
    color = "" if plain else "green" if low > 0 else "red" if high < 0 else ""
    return f"[{color}]{text}[/]" if color else text


def _interval(ends: tuple[float, float] | None, sign: str = "") -> str:
    return "of one prompt" if ends is None else f"{_number(ends[0], sign)}, {_number(ends[1], sign)}"


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if abs(value) < 10 else f"{value:{sign}.2f}"


def _short(split: str) -> str:
    return split if len(split) <= 8 else f"{split[:4]}."
