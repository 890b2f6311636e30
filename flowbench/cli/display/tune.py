"""What `flowbench tune` prints, with rich."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flowbench.cli.display.console import console
from flowbench.escape import terminal as escape

if TYPE_CHECKING:
    from flowbench.experiments.tuning.plan import SearchPlan
    from flowbench.experiments.tuning.search import Request
    from flowbench.experiments.tuning.tune import StudyResult


def plan(requests: Sequence[Request], searched: SearchPlan) -> None:
    """The trials that a search would make, what it costs at most, and whether the rules ask for it."""
    searches = list(dict.fromkeys(request.search for request in requests))
    images = 0
    for search in searches:
        names = list(search.space.dimensions)
        images += search.images
        view = _table(f"{search.algorithm} on {searched.workload.name}, study {search.study + 1}", names)
        for request in requests:
            if request.search is search:
                view.add_row(str(request.trial.number), *_values(request.trial.settings, names))
        console.print(view)
        for choice in search.space.refused:
            console.print(escape(f"not searched, because the model refuses it: {choice}"), soft_wrap=True)
    most = searched.runs // searched.studies * len(searches)
    each = images // max(len(searches), 1)
    console.print(f"cost: at most {most} runs of {each} training images, and their evaluation on dev", highlight=False)
    console.print(escape(_rules(searched.ruleset, searched.deviations)), soft_wrap=True, highlight=False)


def study(result: StudyResult) -> None:
    """A study's trials, and what it selected."""
    from flowbench.experiments.tuning.files import state

    chosen = result.chosen
    names = list(chosen.space)
    view = _table(f"{chosen.algorithm} on {chosen.workload.name}, study {chosen.study + 1}", names)
    for heading in ("gain", "diver-\nsity", "runs"):
        view.add_column(heading, justify="right", no_wrap=True)
    view.add_column("state", no_wrap=True)
    for trial in result.trials:
        scores = (_signed(trial.candidate.gain), _share(trial.candidate.kept), str(len(trial.attempts)))
        view.add_row(
            str(trial.number), *_values(trial.settings, names), *scores, state(trial, chosen.selected, result.finalists)
        )
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


def _table(title: str, names: Sequence[str]) -> Table:
    """A table of trials with a column for each dimension; an underscore is where its heading may be cut."""
    view = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    view.add_column("trial", justify="right", no_wrap=True)
    for name in names:
        view.add_column(escape(name.partition(".")[2]).replace("_", "\n"), no_wrap=True)
    return view


def _values(settings: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [escape(_short(settings[name])) for name in names]


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
