"""What the command line prints, with rich: live progress and tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from flowbench.config import RunConfig
from flowbench.errors import UsageError, did_you_mean
from flowbench.models.presets import load_preset, preset_names
from flowbench.prompts import prompt_sets, splits
from flowbench.registry import algorithms, rewards
from flowbench.terms import trained_metrics

if TYPE_CHECKING:
    from flowbench.cli.doctor import Finding
    from flowbench.experiments.reevaluate import Evaluation
    from flowbench.experiments.run import Listener
    from flowbench.record import Record, Score
    from flowbench.reporting.leaderboard import Row
    from flowbench.training.trainer import IterationLog

console = Console()
CATEGORY_METRICS = ("oracle_exact", "oracle_soft")
MARKS = {" *": "trained on", " °": "held out"}


def _progress(out: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=out,
    )


class LiveProgress:
    """A progress display that lives as long as its context."""

    def __init__(self, out: Console = console) -> None:
        self.progress = _progress(out)
        self.tasks: dict[str, Any] = {}
        self.tenths: dict[str, int] = {}

    def __enter__(self) -> Any:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, name: str, done: int, total: int, note: str = "") -> None:
        """Set a named bar."""
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=total, note=note)
        self.progress.update(self.tasks[name], completed=done, total=total, note=note)
        if not self.progress.console.is_terminal:
            self._log(name, done, total, note)

    def _log(self, name: str, done: int, total: int, note: str) -> None:
        """A line at every tenth, where no bar can be drawn: in a job's log."""
        tenth = 10 * done // max(total, 1)
        if tenth > self.tenths.get(name, 0):
            self.tenths[name] = tenth
            self.progress.console.print(f"{name} {done}/{total} {note}".rstrip(), highlight=False, markup=False)


class RunProgress(LiveProgress):
    """Iteration, reward, images per second and the time left of a run; then its evaluation."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config, self.iterations = config, 0

    def listener(self) -> Listener:
        """The callbacks for `run.execute`."""
        from flowbench.experiments.run import Listener

        return Listener(self._start, self._iteration, lambda done, total: self.show("evaluating", done, total))

    def _start(self, iteration: int, iterations: int) -> None:
        self.iterations = iterations
        c = self.config
        self.progress.console.print(f"{c.algorithm} on {c.reward}, {c.model}, seed {c.seed}: {iterations} iterations")
        self.show("training", iteration, iterations)

    def _iteration(self, log: IterationLog) -> None:
        each = self.config.training.prompts_per_iteration * self.config.training.images_per_prompt
        note = f"reward {log.reward:.4f}  {each / log.seconds:.0f} images/s"
        self.show("training", log.iteration, self.iterations, note)


class EvaluationProgress(LiveProgress):
    """A bar for `evaluate`."""

    def __call__(self, done: int, total: int) -> None:
        """Images done, of all images."""
        self.show("evaluating", done, total)


class BuildProgress(LiveProgress):
    """A bar for each stage of `testbed build`."""

    def __call__(self, stage: str, done: int, total: int, loss: float) -> None:
        """Steps done of a stage, and its loss."""
        self.show(stage, done, total, f"loss {loss:.4f}" if loss else "")


def dry_run(config: RunConfig) -> None:
    """The resolved configuration and its estimated cost."""
    preset, t = load_preset(config.model), config.training
    console.print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).strip(), highlight=False)
    guidance = preset.guidance_scale if t.guidance_scale is None else t.guidance_scale
    per_image = (t.num_steps or preset.num_steps) * (2 if guidance > 1 else 1)
    splits_ = len(config.evaluation.splits)
    evaluation = 2 * splits_ * config.evaluation.prompts * config.evaluation.images_per_prompt
    console.print(
        f"cost: {t.images} training images ({t.images * per_image} function evaluations to sample them), "
        f"{t.images} reward calls; at most {evaluation} images to evaluate"
    )


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
    parts = ("record.json", "curves.png", "frontier.png", "samples/", "checkpoints/tuned/")
    there = ", ".join(part for part in parts if (folder / part).exists())
    console.print(f"{folder}: {there}", highlight=False, soft_wrap=True)


def evaluation(result: Evaluation) -> None:
    """What `evaluate` found: two models compared, or images scored."""
    if result.scores:
        score_table(result.scores, result.trained_on, result.title, result.held_out)
        return
    table = Table(title=result.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("metric", "mean", "95 % interval", "prompts", "images"):
        table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=True)
    for metric, s in result.images.items():
        low, high = s.ci95
        table.add_row(metric, _number(s.mean), f"{_number(low)}, {_number(high)}", str(s.prompts), str(s.images))
    console.print(table)


def score_table(values: Mapping[str, Score], reward: str | None, title: str, held_out: Sequence[str] = ()) -> None:
    """Base, tuned and difference with its interval per metric and split; then the oracle's verdicts per category."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", no_wrap=True, max_width=22)
    table.add_column("split", no_wrap=True)
    for heading in ("base", "tuned", "change", "95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    plain = [key.split("/") for key in values if key.count("/") == 1]
    trained_on = trained_metrics(reward) if reward else ()
    marks = dict.fromkeys(held_out, " °") | dict.fromkeys(trained_on, " *")
    for metric, split in sorted(plain, key=lambda pair: list(dict.fromkeys(m for m, _ in plain)).index(pair[0])):
        s = values[f"{metric}/{split}"]
        low, high = s.diff_ci95
        table.add_row(
            metric + marks.get(metric, ""),
            _short(split),
            _number(s.base),
            _number(s.tuned),
            _colored(_number(s.tuned - s.base, "+"), s, plain=metric in ("w2", "kl")),
            f"{_number(low, '+')}, {_number(high, '+')}",
        )
    console.print(table)
    legend = [f"{mark.strip()} {name}" for mark, name in MARKS.items() if mark in marks.values()]
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
        table.add_column(f"{_short(split)} {metric.removeprefix('oracle_')}", no_wrap=True)
    for category in categories:
        cells = [values.get(f"{metric}/{split}/{category}") for metric, split in columns]
        table.add_row(category, *(_change(s) if s else "" for s in cells))
    return table


def _change(s: Score) -> str:
    return f"{s.base:.2f} -> {s.tuned:.2f} " + _colored(f"{s.tuned - s.base:+.2f}", s)


def _colored(text: str, s: Score, plain: bool = False) -> str:
    """Green or red when the interval of the difference lies on one side of zero."""
    low, high = s.diff_ci95
    color = "" if plain else "green" if low > 0 else "red" if high < 0 else ""
    return f"[{color}]{text}[/]" if color else text


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if abs(value) < 10 else f"{value:{sign}.2f}"


def _short(split: str) -> str:
    return split if len(split) <= 8 else f"{split[:4]}."


def listing(what: str, output: Path) -> None:
    """Algorithms, rewards, models, prompts or runs.

    Raises UsageError for anything else.
    """
    makers = {"algorithms": _algorithms, "rewards": _rewards, "models": _models, "prompts": _prompts}
    if what == "runs":
        console.print(_runs(output))
    elif what in makers:
        console.print(makers[what]())
    else:
        raise UsageError(f"cannot list '{what}'{did_you_mean(what, [*makers, 'runs'])}")


def _table(*headings: str) -> Table:
    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _algorithms() -> Table:
    table = _table("algorithm", "paper", "needs", "what it is")
    for name in algorithms.names():
        info = algorithms.describe(name)
        table.add_row(name, info.paper, ", ".join(sorted(info.needs)), info.summary)
    return table


def _rewards() -> Table:
    table = _table("reward", "source", "licence", "gradient", "truth", "what it is")
    for name in rewards.names():
        info = rewards.describe(name)
        marks = ["yes" if flag else "" for flag in (info.differentiable, info.truth)]
        table.add_row(name, info.source, info.licence, *marks, info.summary)
    return table


def _models() -> Table:
    table = _table("model", "source", "licence", "resolution", "steps", "guidance", "prompts")
    for name in preset_names():
        p = load_preset(name)
        table.add_row(name, p.source, p.licence, str(p.resolution), str(p.num_steps), str(p.guidance_scale), p.prompts)
    return table


def _prompts() -> Table:
    from flowbench.prompts import FOLDER, load_split

    table = _table("prompt set", "split", "prompts", "sha256")
    for name in prompt_sets():
        for split in splits(FOLDER / name):
            content = load_split(name, split)
            table.add_row(name, split, str(len(content.prompts)), content.sha256[:12])
    return table


def _runs(output: Path) -> Table:
    table = _table("run", "state")
    for config in sorted(output.rglob("config.yaml")) if output.exists() else []:
        folder = config.parent
        state = "done" if (folder / "DONE").exists() else "unfinished (continue with --resume)"
        table.add_row(str(folder), state)
    return table


def leaderboard(table: Sequence[Row]) -> None:
    """A leaderboard in the terminal: one table per model, reward and budget; intervals where the terminal is wide."""
    from flowbench.reporting.leaderboard import LEGEND, cells, columns, headings

    shared = 5  # the columns model, reward, algorithm, seeds, images
    for (model, reward, images, _), group in groupby(table, lambda r: (r.model, r.reward, r.images, r.protocol)):
        lines = list(group)
        metrics = columns(lines)
        wide = console.width >= 26 + 24 * len(metrics)
        view = Table(title=f"{model}, trained on {reward} with {images} images", title_justify="left", box=SIMPLE_HEAD)
        view.pad_edge = False
        view.add_column("algorithm", no_wrap=True)
        for heading in ("seeds", *headings(metrics)[shared:]):
            view.add_column(heading.replace("_", " ") if not wide else heading, justify="right")
        for row in lines:
            values = cells(row, metrics)[shared:]
            shown = values if wide else [re.sub(r" \[[^]]*\]", "", value) for value in values]
            view.add_row(row.algorithm, str(row.seeds), *shown)
        console.print(view)
    console.print(LEGEND.replace("\\*", "*"), highlight=False)
    if not wide:
        console.print("intervals: widen the terminal, or --format markdown or csv", highlight=False)


def doctor(findings: Sequence[Finding]) -> None:
    """What is there, what is missing, and what to do about it."""
    view = _table("part", "state", "what to do")
    for f in findings:
        view.add_row(f.part, ("[green]ok[/] " if f.ok else "[yellow]missing[/] ") + f.state, f.remedy)
    console.print(view)
