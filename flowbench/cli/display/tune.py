"""What `flowbench tune` prints, with rich."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flowbench.cli.display.console import console
from flowbench.reporting.escape import terminal as escape

if TYPE_CHECKING:
    from flowbench.experiments.tuning.plan import SearchPlan
    from flowbench.experiments.tuning.tune import StudyResult


def plan(searched: SearchPlan, algorithms: int) -> None:
    """What a search costs at most, and whether the rules ask for it."""
    console.print(f"at most {algorithms * searched.runs} runs; {_rules(searched.ruleset, searched.deviations)}")


def study(result: StudyResult) -> None:
    """A study's trials, and what it selected."""
    from flowbench.experiments.tuning.files import state

    chosen = result.chosen
    names = list(chosen.space)
    view = Table(title=_title(result), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    view.add_column("trial", justify="right", no_wrap=True)
    for name in names:
        view.add_column(escape(name.partition(".")[2].replace("_", "\n")), no_wrap=True)
    for heading in ("gain", "diver-\nsity", "runs"):
        view.add_column(heading, justify="right", no_wrap=True)
    view.add_column("state", no_wrap=True)
    for trial in result.trials:
        scores = (_signed(trial.candidate.gain), _share(trial.candidate.kept), str(len(trial.attempts)))
        values = (escape(_short(trial.settings[name])) for name in names)
        view.add_row(str(trial.number), *values, *scores, state(trial, chosen.selected, result.finalists))
    console.print(view)
    for trial in result.trials:
        if trial.failure:
            console.print(f"trial {trial.number} failed: {escape(trial.failure)}", soft_wrap=True, highlight=False)
    for line in _conclusion(result):
        console.print(escape(line), soft_wrap=True, highlight=False)


def summary(found: Sequence[StudyResult]) -> None:
    """A line per study, where there are several."""
    if len(found) < 2:
        return
    view = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("algorithm", "study", "selected", "gain", "diversity", "failed", "collapsed"):
        view.add_column(heading, no_wrap=True, justify="left" if heading == "algorithm" else "right")
    for c in (result.chosen for result in found):
        selected = "none" if c.selected is None else str(c.selected)
        scores = (selected, _signed(c.gain), _share(c.kept), str(c.failed), str(c.collapsed))
        view.add_row(escape(c.algorithm), str(c.study + 1), *scores)
    console.print(view)


def _title(result: StudyResult) -> str:
    chosen = result.chosen
    return escape(f"{chosen.algorithm} on {chosen.workload.name}, study {chosen.study + 1}: {chosen.trials} trials")


def _conclusion(result: StudyResult) -> list[str]:
    chosen = result.chosen
    if chosen.selected is None:
        lines = [f"selected: none; {chosen.reason}"]
    else:
        settings = " ".join(f"{key}={_short(value)}" for key, value in chosen.settings.items())
        lines = [f"selected: trial {chosen.selected} ({settings}); {chosen.reason}"]
    points = sorted({k for k in (1, 2, 5, 10, 20) if k <= len(chosen.best_of)} | {len(chosen.best_of)})
    lines.append("best of k trials gains " + ", ".join(f"{k}: {chosen.best_of[k - 1]:+.4f}" for k in points))
    lines += [f"at an edge: {edge}" for edge in chosen.edges]
    lines += [f"not searched, because the model refuses it: {choice}" for choice in chosen.refused_choices]
    lines.append(_rules(chosen.ruleset, chosen.deviations))
    return [*lines, f"log: {result.folder}"] if result.folder else lines


def _rules(ruleset: str | None, deviations: Sequence[str]) -> str:
    return f"ruleset: {ruleset}" if ruleset else f"outside of the rules: {'; '.join(deviations)}"


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _signed(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:+.4f}"


def _share(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"
