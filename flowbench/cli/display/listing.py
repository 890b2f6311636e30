"""What `flowbench list` and `flowbench doctor` print: what there is, with rich."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flowbench.cli.display.console import console
from flowbench.errors import UsageError, did_you_mean
from flowbench.escape import terminal as escape
from flowbench.models.presets import load_preset, preset_names
from flowbench.prompts import prompt_sets, splits
from flowbench.registry import algorithms, rewards
from flowbench.workloads import load_workload, workload_names

if TYPE_CHECKING:
    from flowbench.cli.doctor import Finding


def listing(what: str, output: Path) -> None:
    """Algorithms, rewards, models, prompts, workloads or runs.

    Raises UsageError for anything else.
    """
    makers = {
        "algorithms": _algorithms,
        "rewards": _rewards,
        "models": _models,
        "prompts": _prompts,
        "workloads": _workloads,
        "defaults": _defaults,
    }
    if what == "runs":
        console.print(_runs(output))
    elif what in makers:
        console.print(makers[what]())
    else:
        raise UsageError(f"cannot list '{what}'{did_you_mean(what, [*makers, 'runs'])}")


WIDEST = 24  # characters of a first column whose names are never broken


def _table(*headings: str, names: Sequence[str] = ()) -> Table:
    """An empty table; `names` of the first column stay whole on a narrow terminal, and the other columns fold."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    whole = min(max(map(len, names), default=0), WIDEST)
    for i, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", min_width=None if i else whole)
    return table


def _algorithms() -> Table:
    table = _table("algorithm", "paper", "needs", "what it is", names=algorithms.names())
    for name in algorithms.names():
        info = algorithms.describe(name)
        table.add_row(*map(escape, (name, info.paper, ", ".join(sorted(info.needs)), info.summary)))
    return table


def _rewards() -> Table:
    table = _table("reward", "source", "licence", "gradient", "truth", "what it is", names=rewards.names())
    for name in rewards.names():
        info = rewards.describe(name)
        marks = ["yes" if flag else "" for flag in (info.differentiable, info.truth)]
        table.add_row(*map(escape, (name, info.source, info.licence, *marks, info.summary)))
    return table


def _models() -> Table:
    table = _table("model", "source", "licence", "resolution", "steps", "guidance", "prompts", names=preset_names())
    for name in preset_names():
        p = load_preset(name)
        size = str(p.height) if p.height == p.width else f"{p.height} x {p.width}"
        told = (name, p.source, p.licence, size, str(p.num_steps), str(p.guidance_scale), p.prompts)
        table.add_row(*map(escape, told))
    return table


def _prompts() -> Table:
    from flowbench.prompts import FOLDER, load_split

    table = _table("prompt set", "split", "prompts", "sha256")
    for name in prompt_sets():
        for split in splits(FOLDER / name):
            content = load_split(name, split)
            table.add_row(escape(name), escape(split), str(len(content.prompts)), content.sha256[:12])
    return table


def _workloads() -> Table:
    table = _table("workload", "trains", "hash", "what it asks", names=workload_names())
    for name in workload_names():
        w = load_workload(name)
        trains = f"{w.model} on {w.reward}, {w.images} images, version {w.version}"
        told = (name, trains, w.hash, w.summary)
        table.add_row(*map(escape, told))
    return table


def _defaults() -> Table:
    """What each algorithm brings for the models that it knows, and which search that comes from."""
    table = _table("algorithm", "model", "settings", "log", names=algorithms.names())
    for name in algorithms.names():
        for model, own in algorithms.get(name).cls.defaults.items():
            named = {f"training.{key}": value for key, value in own.training.items()}
            named |= {f"algorithm.{key}": value for key, value in own.algorithm.items()}
            settings = "\n".join(escape(f"{key}={value}") for key, value in named.items())
            table.add_row(escape(name), escape(model), settings, escape(own.log or "no search"))
    return table


def _runs(output: Path) -> Table:
    table = _table("run", "state")
    for config in sorted(output.rglob("config.yaml")) if output.exists() else []:
        folder = config.parent
        state = "done" if (folder / "DONE").exists() else "unfinished (continue with --resume)"
        table.add_row(escape(str(folder)), state)
    return table


def doctor(findings: Sequence[Finding]) -> None:
    """What is there, what is missing, and what to do about it."""
    view = _table("part", "state", "what to do")
    for f in findings:
        mark = "[green]ok[/] " if f.ok else "[yellow]missing[/] "
        view.add_row(escape(f.part), mark + escape(f.state), escape(f.remedy))
    console.print(view)
